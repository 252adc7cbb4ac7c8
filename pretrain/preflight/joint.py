"""What the processes find out together: whether they all come, the clocks, the bandwidth of all-reduces.

To tell which node is slow, each is measured in a ring with the one before it and the one after it. A slow node is slow with both; its
neighbours have a second one that is not.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from datetime import timedelta

from pretrain.preflight.reports import Report

REDUCED_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
REPETITIONS, ROUNDS = 5, 5
STAY_S = 20.0
TIMEOUT = timedelta(seconds=60)
"""Of one collective."""


def measure(
    report: Report, kind: str, rank: int, nodes: list[str], per_node: int, address: str, port: int, wait_s: float
) -> None:  # fmt: skip
    """Meet the others at `address`:`port`, which rank 0 serves, and measure with those that have come after `wait_s` seconds.

    rank: of this process; nodes hold `per_node` each, in order. Fills the report; raises nothing for what others do.
    """
    import torch.distributed as dist

    try:
        store = dist.TCPStore(address, port, is_master=rank == 0, timeout=timedelta(seconds=wait_s), wait_for_workers=False)
        present = _meet(store, rank, nodes, per_node, wait_s)
        if report.node not in present:
            report.note = "came too late for what is measured together"
            return
        ranks = {node: [i * per_node + local for local in range(per_node)] for i, node in enumerate(nodes)}
        order = [member for node in present for member in ranks[node]]
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo", store=dist.PrefixStore("preflight", store), rank=order.index(rank),
            world_size=len(order), timeout=TIMEOUT,
        )  # fmt: skip
        report.joined = True
        _measure(report, kind, present, per_node)
        # Rank 0 serves the store: it leaves last.
        store.set(f"left {rank}", "1")
        if rank == 0:
            _wait(lambda: store.check([f"left {other}" for other in order]), 10.0)
    except (RuntimeError, ValueError) as error:
        report.note = f"measuring together failed: {str(error).splitlines()[0]}"
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def stay_away(rank: int, address: str, port: int, wait_s: float) -> None:
    """Tell those who meet there that this process cannot come."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError, ValueError):
        store = dist.TCPStore(address, port, is_master=rank == 0, timeout=timedelta(seconds=wait_s), wait_for_workers=False)
        store.set(f"away {rank}", "1")
        if rank == 0:
            # The others have no other place to meet: they find that out from the store.
            store.set("present", "")
            time.sleep(STAY_S)


def _meet(store, rank: int, nodes: list[str], per_node: int, wait_s: float) -> list[str]:
    """Nodes all of whose processes have come in time: rank 0 decides."""
    store.set(f"here {rank}", "1")
    if rank == 0:
        ranks = range(len(nodes) * per_node)
        _wait(lambda: all(store.check([f"here {other}"]) or store.check([f"away {other}"]) for other in ranks), wait_s)
        came = {other for other in ranks if store.check([f"here {other}"])}
        of_node = {node: set(range(i * per_node, (i + 1) * per_node)) for i, node in enumerate(nodes)}
        store.set("present", "\n".join(node for node in nodes if of_node[node] <= came))
    store.wait(["present"], timedelta(seconds=wait_s + 30))
    return store.get("present").decode().split()


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def _measure(report: Report, kind: str, nodes: list[str], per_node: int) -> None:
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    report.skew_s = _skew(dist.get_world_size(), rank, kind)
    of_node = [list(range(i * per_node, (i + 1) * per_node)) for i in range(len(nodes))]
    mine = rank // per_node
    data = torch.zeros(REDUCED_BYTES[kind] // 4, dtype=torch.float32, device=kind)
    if per_node > 1:
        groups = [dist.new_group(ranks, timeout=TIMEOUT) for ranks in of_node]
        report.inside_gb_s = _bandwidth(data, groups[mine], per_node)
    for pairs in ring(len(nodes)):
        groups = {pair: dist.new_group(of_node[pair[0]] + of_node[pair[1]], timeout=TIMEOUT) for pair in pairs}
        dist.barrier()
        for (first, second), group in groups.items():
            if mine in (first, second):
                other = nodes[second if mine == first else first]
                report.between_gb_s[other] = _bandwidth(data, group, 2 * per_node)
    dist.barrier()


def ring(count: int) -> list[list[tuple[int, int]]]:
    """The edges of a ring of nodes, in rounds in which no node appears twice."""
    if count < 2:
        return []
    if count == 2:
        return [[(0, 1)]]
    edges = [(i, (i + 1) % count) for i in range(count)]
    paired = count - count % 2
    rounds = [edges[:paired:2], edges[1:paired:2]]
    return rounds + ([edges[paired:]] if count % 2 else [])


def _bandwidth(data, group, size: int) -> float:
    """10^9 bytes/s that each device sends, as NCCL's tests count them: the size does not matter."""
    import torch
    import torch.distributed as dist

    def reduce() -> float:
        started = time.perf_counter()
        dist.all_reduce(data, group=group)
        if data.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    reduce()
    seconds = statistics.median(reduce() for _ in range(REPETITIONS))
    return 2 * (size - 1) / size * data.numel() * data.element_size() / seconds / 1e9


def _skew(size: int, rank: int, kind: str) -> float:
    """Seconds that this clock is ahead of the median: all are read behind a barrier, several times."""
    import torch
    import torch.distributed as dist

    found = []
    for _ in range(ROUNDS):
        dist.barrier()
        times = [torch.zeros(1, dtype=torch.float64, device=kind) for _ in range(size)]
        dist.all_gather(times, torch.tensor([time.time()], dtype=torch.float64, device=kind))
        clocks = [value.item() for value in times]
        found.append(clocks[rank] - statistics.median(clocks))
    return statistics.median(found)
