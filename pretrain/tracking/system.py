"""System metrics: a thread that samples the machine into system.jsonl, under the names MLflow's own monitor uses.

Same line format as metrics.jsonl, `step` being the number of the sample. Processor, memory, disk and network come from
psutil, GPUs from pynvml where it is installed and finds a driver. Only the machine of the tracking rank is sampled.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.tracking.journal import Journal, decode_line, iterate_lines

logger = logging.getLogger(__name__)

MEGABYTE = 1e6


class SystemSampler:
    """Samples every `interval_s` seconds until `stop`; the first sample is taken at once.

    Args:
        path: the system journal; sample numbers continue behind its last line.
        interval_s: seconds between samples, > 0.
    """

    def __init__(self, path: Path, interval_s: float) -> None:
        import psutil  # here and not in the thread: a data loader forked meanwhile would inherit a locked import

        self._psutil = psutil
        self._journal = Journal(path)
        self._interval_s = interval_s
        self._next = 1 + max(_numbers(path), default=-1)
        self._stop = threading.Event()
        self._gpus = _open_gpus()
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples and close the journal."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            self._journal.close()

    def abandon(self) -> None:
        """Take no more samples; what could not be written is dropped."""
        self._stop.set()
        self._thread.join(timeout=5.0)
        if not self._thread.is_alive():
            self._journal.abandon()

    def _run(self) -> None:
        psutil = self._psutil
        process = psutil.Process()
        received, sent = _network(psutil)
        psutil.cpu_percent()  # the first call only starts the measurement
        while True:
            memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._journal.path.parent))
            received_now, sent_now = _network(psutil)
            sample = {
                "system/cpu_utilization_percentage": psutil.cpu_percent(),
                "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
                "system/system_memory_usage_percentage": memory.percent,
                "system/process_memory_megabytes": process.memory_info().rss / MEGABYTE,
                "system/disk_usage_percentage": disk.percent,
                "system/disk_available_megabytes": disk.free / MEGABYTE,
                "system/network_receive_megabytes": (received_now - received) / MEGABYTE,
                "system/network_transmit_megabytes": (sent_now - sent) / MEGABYTE,
                **_sample_gpus(self._gpus),
            }
            self._journal.append(self._next, sample)
            self._next += 1
            if self._stop.wait(self._interval_s):
                return


def _numbers(path: Path) -> Iterator[int]:
    """Of the samples that are there; damaged lines stay where they are, as in the other journal."""
    for line, _ in iterate_lines(path, 0):
        with suppress(ValueError):
            yield decode_line(line)["step"]


def _network(psutil: Any) -> tuple[int, int]:
    counters = psutil.net_io_counters()
    return (counters.bytes_recv, counters.bytes_sent) if counters else (0, 0)


def _open_gpus() -> list[Any]:
    """pynvml handles of all GPUs; empty without pynvml or without a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        logger.info("no GPU metrics: %s", error)
        return []


def _sample_gpus(handles: list[Any]) -> dict[str, float]:
    if not handles:
        return {}
    import pynvml

    sample: dict[str, float] = {}
    for index, handle in enumerate(handles):
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            sample[f"system/gpu_{index}_utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu
            sample[f"system/gpu_{index}_memory_usage_megabytes"] = memory.used / MEGABYTE
            sample[f"system/gpu_{index}_memory_usage_percentage"] = 100 * memory.used / memory.total
            sample[f"system/gpu_{index}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
        except pynvml.NVMLError:
            continue  # a GPU without one of these counters (MIG slices) leaves the others alone
    return sample
