"""Runs a function on several real processes joined by gloo, for tests of whatever communicates."""

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = 120) -> list:
    """`fn(rank, *args)` on `world_size` spawned processes with the default gloo group initialized; returns the ranks' results.

    fn, args and results must be picklable; fn is a function of a module's top level. The processes meet through a file, so
    no port is needed; they run on one thread and may have children of their own (Megatron's checkpoint writer starts one).
    Raises RuntimeError with the traceback of every rank that failed, TimeoutError after `timeout` seconds; either way all
    processes are gone afterwards.
    """
    context = multiprocessing.get_context("spawn")
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as folder:
        processes, receivers = [], []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(rank, world_size, f"{folder}/store", payload, sender, timeout))
                process.start()
                sender.close()
                processes.append(process)
                receivers.append(receiver)
            return _collect(processes, receivers, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(processes: list, receivers: list[Connection], deadline: float) -> list:
    reports: dict[int, tuple[bool, Any]] = {}
    while len(reports) < len(processes):
        pending = [receiver for rank, receiver in enumerate(receivers) if rank not in reports]
        ready = wait(pending, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(processes)) if rank not in reports]
            raise TimeoutError(f"ranks {missing} did not answer in time; their stacks are on stderr")
        for receiver in ready:
            rank = receivers.index(receiver)
            reports[rank] = _receive(receiver, processes[rank], deadline)
        failures = [f"rank {rank}:\n{report}" for rank, (ok, report) in sorted(reports.items()) if not ok]
        if failures:
            raise RuntimeError("\n".join(failures))
    for rank, process in enumerate(processes):
        process.join(max(0, deadline - time.monotonic()))
        if process.exitcode != 0:
            raise RuntimeError(f"rank {rank} gave its result, but then ended with exit code {process.exitcode} (None: it hung)")
    return [pickle.loads(reports[rank][1]) for rank in range(len(processes))]


def _receive(receiver: Connection, process, deadline: float) -> tuple[bool, Any]:
    try:
        return receiver.recv()
    except EOFError:
        process.join(max(0, deadline - time.monotonic()))
        return False, f"died without a report, exit code {process.exitcode}"


def _child(rank: int, world_size: int, store: str, payload: bytes, sender: Connection, timeout: float) -> None:
    # Shortly before the parent gives up, each rank shows where it hangs.
    faulthandler.dump_traceback_later(0.9 * timeout)
    # On a machine with GPUs Megatron and DeepSpeed would take them; these processes are joined by gloo.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    # Without this gloo resolves the host name, which fails on machines without a network.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        fn, args = pickle.loads(payload)
        # Pickled here, by value: tensors sent through multiprocessing would live in memory that ends with this process.
        result = pickle.dumps(fn(rank, *args))
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
    sender.send((True, result))
    if dist.is_initialized():
        # Nobody leaves while a slower rank still needs it.
        dist.barrier()
        dist.destroy_process_group()
