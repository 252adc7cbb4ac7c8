"""What a process finds out alone: its device, the disks, the data."""

import os
import secrets
import time
from pathlib import Path

from pretrain.preflight.reports import Report

PROBE_BYTES = 32 << 20
"""Written for trial to each disk."""
COMPUTE_S = 0.5
"""How long a device multiplies matrices."""
MATRIX = {"cuda": 4096, "cpu": 512}


def check_disk(report: Report, folder: Path, what: str) -> float | None:
    """Write to it; returns 10^6 bytes/s."""
    path = folder / f".probe.{report.node}.{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            with path.open("wb") as file:
                file.write(os.urandom(1 << 20) * (PROBE_BYTES >> 20))
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)
        return PROBE_BYTES / 1e6 / (time.perf_counter() - started)
    except OSError as error:
        report.problems.append(f"cannot write {PROBE_BYTES >> 20} MiB to the {what} {folder} ({error.strerror or error})")
        return None


def check_data(report: Report, shards: Path) -> None:
    """The manifest and the beginning of each split's shards."""
    from data_tools.errors import ManifestError
    from data_tools.manifest import Manifest

    try:
        manifest = Manifest.load(shards)
        for split in manifest.splits:
            manifest.check_sizes(split)
            for shard in (manifest.shards_of(split)[0], manifest.shards_of(split)[-1]):
                with (shards / shard.name).open("rb") as file:
                    file.read(4096)
    except (ManifestError, OSError) as error:
        report.problems.append(f"cannot read the data: {error}")


def check_devices(report: Report, device: str, expected: int) -> str | None:
    """Whether there are as many as expected. Returns "cuda" or "cpu", what this process uses; None where its own is missing."""
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available() and not _expects_gpus()):
        report.device = "CPU"
        return "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < expected and report.local_rank == 0:
        report.problems.append(f"{count} of {expected} GPUs are there")
    if report.local_rank >= count:
        return None
    torch.cuda.set_device(report.local_rank)
    report.device = torch.cuda.get_device_name(report.local_rank)
    _check_health(report)
    return "cuda"


def _expects_gpus() -> bool:
    """Whether Slurm has given the job GPUs that exist."""
    return Path("/dev/nvidiactl").exists()


def _check_health(report: Report) -> None:
    """What the driver says of the device; nothing where nvidia-ml-py is not installed."""
    try:
        import pynvml
    except ImportError:
        report.note = "nvidia-ml-py is not installed: the driver was not asked about errors"
        return
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(report.local_rank)
        name = f"GPU {report.local_rank}"
        questions = {
            "uncorrected memory errors since the last boot": lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            ),
            "rows whose replacement waits for a reset": lambda: pynvml.nvmlDeviceGetRemappedRows(handle)[2],
            "rows that could not be replaced": lambda: pynvml.nvmlDeviceGetRemappedRows(handle)[3],
            "slowed down by the hardware, for heat or power": lambda: (
                pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & pynvml.nvmlClocksThrottleReasonHwSlowdown
            ),
        }
        for text, ask in questions.items():
            try:
                value = ask()
            except pynvml.NVMLError:
                # Not every device counts everything.
                continue
            if value:
                report.problems.append(f"{name}: {text} ({value})")
    except pynvml.NVMLError as error:
        report.problems.append(f"the driver does not answer: {error}")


def check_computing(report: Report, kind: str) -> None:
    """The speed of a matrix product, and whether it is right: products of small integers are exact in every precision."""
    import torch

    size = MATRIX[kind]
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-2, 3, (size, size), generator=generator).to(kind, dtype) for _ in range(2))
    vector = torch.randint(1, 4, (size, 1), generator=generator).to(kind, torch.float64)
    product = a @ b
    # (A B) v = A (B v): the second in double precision, where it is exact.
    expected = a.double() @ (b.double() @ vector)
    wrong = (a.float() @ b.float()).double() @ vector != expected
    if wrong.any():
        report.problems.append(f"device {report.local_rank} ({report.device}) computes {int(wrong.sum())} of {size} sums wrongly")
    repetitions, started = 0, time.perf_counter()
    while time.perf_counter() - started < COMPUTE_S:
        for _ in range(10 if kind == "cuda" else 1):
            torch.matmul(a, b, out=product)
            repetitions += 1
        if kind == "cuda":
            torch.cuda.synchronize()
    report.tflops = repetitions * 2 * size**3 / (time.perf_counter() - started) / 1e12
