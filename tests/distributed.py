"""Runs functions on real processes joined by gloo, for tests of whatever communicates.

Importing the libraries costs many seconds, a process group milliseconds: processes are forked from one that has imported them
(`preload`), and a `Pool` keeps its processes and gives every function a world of its own.
"""

import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

MAX_THREADS = 60
"""Of one process. Megatron's caches keep some of the process groups that a model had, and gloo's threads of an idle group wake up a
hundred times a second: a process that has had many layouts slows the machine down. A new one costs a fraction of a second."""
AT_THE_END: list[Callable[[], None]] = []
"""Called before a world's groups are destroyed, by modules that keep some."""
ALWAYS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
"""On a machine with GPUs Megatron and DeepSpeed would take them; these processes are joined by gloo."""


class Pool:
    """`size` processes, started by the first `run` and again by the first one after a failure.

    fresh: start each from nothing, for tests that measure a process: a forked one shares its memory with others.
    A context manager; leaving it ends the processes and raises RuntimeError where one does not end by itself.
    """

    def __init__(self, size: int, fresh: bool = False):
        self.size, self.fresh = size, fresh
        self._folder = tempfile.TemporaryDirectory()
        self._processes: list = []
        self._connections: list[Connection] = []
        self._worlds = 0

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self.rest()
        finally:
            self._kill()
            self._folder.cleanup()

    def run(self, fn: Callable, ranks: int, *args: Any, timeout: float = 300) -> list:
        """`fn(rank, *args)` on the first `ranks` processes with a default gloo group of their own; returns the ranks' results.

        fn, args and results must be picklable; fn is a function of a module's top level. The processes meet through a file, so
        no port is needed; they run on one thread and may have children of their own (Megatron's checkpoint writer starts one).
        Raises RuntimeError with the traceback of every rank that failed, TimeoutError with the stacks of those that did not
        answer within `timeout` seconds. Either way all processes are replaced, so that nothing is left for the next call.
        """
        if not 1 <= ranks <= self.size:
            raise ValueError(f"{ranks} ranks of a pool of {self.size}")
        if not self._processes:
            self._start()
        self._worlds += 1
        world = f"{self._folder.name}/world{self._worlds}"
        payload, deadline = pickle.dumps((fn, args)), time.monotonic() + timeout
        try:
            for rank in range(ranks):
                self._connections[rank].send((ranks, world, payload, deadline))
            reports = self._collect(ranks, world, deadline)
        except BaseException:
            self._kill()
            raise
        if max(threads for _, threads in reports) > MAX_THREADS:
            self.rest()
        return [pickle.loads(result) for result, _ in reports]

    def rest(self) -> None:
        """End the processes until the next `run`. Raises RuntimeError where one does not end by itself."""
        try:
            self._end()
        finally:
            self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn") if self.fresh else forking()
        for rank in range(self.size):
            connection, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(connection)

    def _collect(self, ranks: int, world: str, deadline: float) -> list[tuple[bytes, int]]:
        """(pickled result, number of threads) of every rank."""
        reports: dict[int, tuple[bool, Any]] = {}
        while len(reports) < ranks:
            pending = {self._connections[rank]: rank for rank in range(ranks) if rank not in reports}
            ready = wait(list(pending), timeout=max(0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(pending.values())
                raise TimeoutError(f"ranks {missing} did not answer in time\n" + "\n".join(_stacks(world, rank) for rank in missing))
            for connection in ready:
                reports[pending[connection]] = self._receive(pending[connection], deadline)
            failures = [f"rank {rank}:\n{report}" for rank, (ok, report) in sorted(reports.items()) if not ok]
            if failures:
                raise RuntimeError("\n".join(failures))
        return [reports[rank][1] for rank in range(ranks)]

    def _receive(self, rank: int, deadline: float) -> tuple[bool, Any]:
        try:
            return self._connections[rank].recv()
        except EOFError:
            self._processes[rank].join(max(0, deadline - time.monotonic()))
            return False, f"died without a report, exit code {self._processes[rank].exitcode}"

    def _end(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for rank, process in enumerate(self._processes):
            process.join(30)
            if process.exitcode != 0:
                raise RuntimeError(f"rank {rank} gave its results, but then ended with exit code {process.exitcode} (None: it hung)")

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._processes, self._connections = [], []


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = 120, fresh: bool = False) -> list:
    """`Pool.run` on processes of its own, which are gone afterwards."""
    with Pool(world_size, fresh) as pool:
        return pool.run(fn, world_size, *args, timeout=timeout)


def forking():
    """The multiprocessing context of processes forked from a server, which has imported `tests.preload` and done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    # What the libraries read when they are imported; of a server that runs already nothing changes.
    with mock.patch.dict(os.environ, {**ALWAYS, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}):
        multiprocessing.forkserver.ensure_running()
    return context


def _stacks(world: str, rank: int) -> str:
    """Where a rank hung; each one writes it down shortly before the parent gives up."""
    path, deadline = Path(f"{world}.stacks{rank}"), time.monotonic() + 10
    # The main thread's outermost frame comes last; a rank that did not get to run writes late.
    while not (text := path.read_text() if path.exists() else "").endswith(" in <module>\n") and time.monotonic() < deadline:
        time.sleep(0.05)
    return f"rank {rank} hung at:\n{text or '(it had not started)'}"


def _serve(rank: int, connection: Connection) -> None:
    """A pool's process: one function after another, until it receives None or fails."""
    os.environ.update(ALWAYS, RANK=str(rank), LOCAL_RANK=str(rank))
    # Without this gloo resolves the host name, which fails on machines without a network.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while (job := connection.recv()) is not None:
        try:
            _run_in_world(rank, connection, *job)
        except BaseException:
            connection.send((False, traceback.format_exc()))
            raise SystemExit(1) from None


def _run_in_world(rank: int, connection: Connection, world_size: int, world: str, payload: bytes, deadline: float) -> None:
    # The clock is that of all processes of the machine.
    timeout = max(1.0, deadline - time.monotonic())
    with open(f"{world}.stacks{rank}", "w") as stacks:
        faulthandler.dump_traceback_later(0.9 * timeout, file=stacks)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ["WORLD_SIZE"] = str(world_size)
        dist.init_process_group(
            "gloo", store=dist.FileStore(world, world_size), rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        fn, args = pickle.loads(payload)
        # Pickled here, by value: tensors sent through multiprocessing would live in memory that ends with this process.
        result = pickle.dumps(fn(rank, *args))
        if dist.is_initialized():
            # Nobody leaves while a slower rank still needs it.
            dist.barrier()
            _leave_world()
        faulthandler.cancel_dump_traceback_later()
    connection.send((True, (result, psutil.Process().num_threads())))


def _leave_world() -> None:
    """Destroy all process groups, with what DeepSpeed remembers of them where it was used."""
    import torch.distributed as dist

    for forget in AT_THE_END:
        forget()
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()
    # Models in reference cycles keep their groups, and a group its sockets and threads.
    gc.collect()
