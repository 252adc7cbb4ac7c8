"""How long this rank's own forward passes take, without waiting for its data-parallel neighbours.

Forward passes communicate among tensor-parallel ranks (and, at ZeRO-3, gather weights), never gradients: in a job in which all ranks wait
for the slowest in every backward, they show which one that is, or its tensor-parallel group. megatron.core.utils.StragglerDetector (0.16.1)
measures the same with CUDA events, but only there, tells the fastest and slowest ranks without saying whether that is unusual, and opens a
control port on all interfaces; this is its measurement alone.
"""

import contextlib
import time
from collections.abc import Iterator

import torch


class Stopwatch:
    """Stands still until `start`."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._runs = False
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Measure from here on, from 0."""
        self._runs, self._seconds = True, 0.0
        self._events.clear()

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Around what is to be measured."""
        if not self._runs:
            yield
        elif self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def stop(self) -> float:
        """Seconds since `start`; on a GPU waits for what was measured."""
        self._runs = False
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
            self._events.clear()
        return self._seconds
