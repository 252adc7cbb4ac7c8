"""What NVIDIA's driver knows of a GPU, through pynvml where it is installed. It makes no CUDA context: processes may be forked later."""

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOREIGN_BYTES = 1 << 30
"""GPU memory of processes that are there before ours: more than what a driver or a display takes."""


@dataclass(kw_only=True)
class Reading:
    """Of one GPU; None is what the driver does not say."""

    uncorrected_errors: int | None = None
    """ECC errors in memory since the driver was loaded."""
    remap_pending: bool | None = None
    """Rows or pages of memory wait to be replaced."""
    remap_failed: bool | None = None
    slowdown: bool | None = None
    """The hardware itself lowers its clocks: heat, or the power supply."""
    temperature: int | None = None
    """Degrees Celsius."""
    foreign_bytes: int | None = None
    """Memory of other processes; to be read before ours begin."""


def can_ask() -> bool:
    """Whether nvidia-ml-py is installed, without which the driver is not asked."""
    return importlib.util.find_spec("pynvml") is not None


def kind_of(device: str) -> str:
    """ "cuda" or "cpu", for "auto" as well. Whether torch finds a GPU is asked later: one that it does not find is a problem."""
    if device != "auto":
        return device
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def problems(index: int, reading: Reading) -> list[str]:
    """A sentence each."""
    found = []
    if reading.uncorrected_errors:
        found.append(f"GPU {index} has {reading.uncorrected_errors} uncorrected memory errors: drain the node and reset the GPU")
    if reading.remap_failed:
        found.append(f"GPU {index} has broken memory that could not be remapped: have it replaced")
    elif reading.remap_pending:
        found.append(f"GPU {index} has broken memory that waits to be remapped: drain the node and reset the GPU")
    if reading.slowdown:
        heat = "" if reading.temperature is None else f" at {reading.temperature} degrees"
        found.append(f"GPU {index} is slowed down by its hardware{heat}: see to its cooling and power")
    if (reading.foreign_bytes or 0) > FOREIGN_BYTES:
        found.append(f"GPU {index} holds {reading.foreign_bytes / 2**30:.1f} GiB of other processes: end them")
    return found


def foreign(count: int) -> list[Reading]:
    """What other processes hold, before ours use the GPUs."""
    return _readings(count, lambda nvml, handle: Reading(foreign_bytes=_foreign_bytes(nvml, handle)))


def read(count: int) -> list[Reading]:
    """Everything else, of GPUs that are warm from work."""
    return _readings(count, _read)


def _readings(count: int, look: Callable[[Any, Any], Reading]) -> list[Reading]:
    """Of the first `count` visible GPUs; empty without pynvml or a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found = []
    try:
        for name in _visible(count):
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID(name)
            found.append(look(pynvml, handle))
    except pynvml.NVMLError:
        # Slices of a GPU, or numbers of another container: nothing can be said of these.
        pass
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
    return found


def _visible(count: int) -> list[str]:
    """The driver's names of CUDA's devices 0 to count - 1."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(count)] if names is None else [name.strip() for name in names.split(",") if name.strip()][:count]


def _read(nvml: Any, handle: Any) -> Reading:
    def ask(question: Callable[[], Any]) -> Any:
        # Not every GPU, and not every version of pynvml, knows all of these.
        with contextlib.suppress(nvml.NVMLError, AttributeError):
            return question()
        return None

    errors = ask(lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC))
    rows = ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    pages = ask(lambda: nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle))
    clocks = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
    slow = sum(getattr(nvml, f"nvmlClocksThrottleReasonHw{reason}", 0) for reason in ("Slowdown", "ThermalSlowdown", "PowerBrakeSlowdown"))
    return Reading(
        uncorrected_errors=errors,
        remap_pending=None if rows is None and pages is None else bool(rows and rows[2]) or bool(pages),
        remap_failed=None if rows is None else bool(rows[3]),
        slowdown=None if clocks is None else bool(clocks & slow),
        temperature=ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
    )


def _foreign_bytes(nvml: Any, handle: Any) -> int | None:
    try:
        return sum(process.usedGpuMemory or 0 for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle))
    except nvml.NVMLError:
        return None
