"""What the process of one device does when it is asked: a matrix product whose result is known, and all-reduces with others."""

import os
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WIDTH = {"cuda": 8192, "cpu": 768}
WINDOW_S = {"cuda": 1.0, "cpu": 0.6}
"""How long a measurement is repeated: the mean tells of a process that is stopped now and then, the best one would not."""
BYTES = {"cuda": 256 << 20, "cpu": 2 << 20}
"""Of an all-reduce."""
LOOKS = 10
"""How often, within the time that all-reduces are repeated, the processes agree on going on."""
MOST_AT_ONCE = 200
"""All-reduces between two such looks."""


def count(kind: str) -> int | None:
    """CUDA devices; None on CPU, where there may be as many processes as one likes."""
    import torch

    return torch.cuda.device_count() if kind == "cuda" else None


def compute(index: int, kind: str) -> dict[str, Any]:
    """{"name", "tflops", "wrong": rows of the product that are not what they must be, of "rows"}.

    Matrices of -1, 0 and 1, mostly 0: each sum is an integer below 256 and exact in bf16 in whatever order it is added up. Any
    wrong element shows in its row: C r = A (B r) for a vector r of integers, exactly, in fp64.
    """
    import torch

    device = _device(index, kind)
    width, dtype = WIDTH[kind], torch.bfloat16 if kind == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-4, 5, (width, width), generator=generator).div_(4, rounding_mode="trunc").to(device, dtype) for _ in range(2))
    products = torch.mm(a, b)
    _synchronize(device)
    begun, times = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - begun) < WINDOW_S[kind]:
        torch.mm(a, b, out=products)
        _synchronize(device)
        times += 1
    weights = torch.arange(1, width + 1, dtype=torch.float64, device=device) % 7 + 1
    wrong = (products.double() @ weights != a.double() @ (b.double() @ weights)).sum().item()
    name = torch.cuda.get_device_name(device) if kind == "cuda" else "CPU"
    return {"name": name, "tflops": 2 * width**3 * times / elapsed / 1e12, "wrong": wrong, "rows": width}


def all_reduce(index: int, kind: str, meet: dict[str, Any], rank: int, size: int, limit_s: float) -> float:
    """Bus bandwidth in GB/s, 2 (size - 1) / size times the bytes a second. Raises RuntimeError where it does not come about.

    meet: {"file"} for processes of one machine, else {"address", "port", "prefix"} of a store that is there.
    """
    import torch
    import torch.distributed as dist

    device, limit = _device(index, kind), timedelta(seconds=limit_s)
    # An all-reduce that does not end raises, instead of ending the process.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    if "file" in meet:
        store: dist.Store = dist.FileStore(meet["file"], size)
    else:
        store = dist.PrefixStore(meet["prefix"], dist.TCPStore(meet["address"], meet["port"], is_master=False, timeout=limit))
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=limit, device_id=device if kind == "cuda" else None
    )  # fmt: skip
    try:
        pattern = torch.arange(BYTES[kind] // 4, device=device).remainder_(251).float()
        values = pattern + rank
        dist.all_reduce(values)
        wrong = (values != pattern * size + size * (size - 1) // 2).sum().item()
        values.zero_()
        once = _repeated(values, WINDOW_S[kind], device)
    finally:
        dist.destroy_process_group()
    if wrong:
        raise RuntimeError(f"{wrong} of {len(pattern)} sums are wrong")
    return 2 * (size - 1) / size * BYTES[kind] / once / 1e9


def _repeated(values: "torch.Tensor", window_s: float, device: "torch.device") -> float:
    """Mean seconds of an all-reduce, repeated until the slowest rank has spent `window_s` on it.

    A number of repetitions settled on beforehand would not do: the few that follow from a first one that was held up may fall
    between two hold-ups of a process that is stopped now and then.
    """
    elapsed, times, more = 0.0, 0, 1
    # What only a first one takes is none of the measurement, and all begin together.
    _slowest(0.0, device)
    while True:
        begun = time.perf_counter()
        _all_reduces(values, more, device)
        elapsed += time.perf_counter() - begun
        times += more
        # As of all, so that all go on or none does.
        longest = _slowest(elapsed, device)
        if longest >= window_s:
            return elapsed / times
        more = max(1, min(MOST_AT_ONCE, int(window_s / LOOKS * times / longest)))


def _slowest(seconds: float, device: "torch.device") -> float:
    import torch
    import torch.distributed as dist

    longest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return longest.item()


def _all_reduces(values: "torch.Tensor", times: int, device: "torch.device") -> None:
    import torch.distributed as dist

    if device.type == "cuda":
        # Waiting for each of them would measure how often NCCL's wait looks.
        for work in [dist.all_reduce(values, async_op=True) for _ in range(times)]:
            work.wait()
    else:
        for _ in range(times):
            dist.all_reduce(values)
    _synchronize(device)


def _device(index: int, kind: str) -> "torch.device":
    import torch

    if kind == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _synchronize(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
