"""What this process is doing, for whoever must tell of it: the message of a failure, and the watchdog's of a hang."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Doing:
    step: int
    """The one being taken, counted from 1; 0 before the first."""
    phase: str
    count: int
    """Of the phases entered so far: it grows alike on all ranks that keep up with each other."""
    since: float
    """time.monotonic()."""
    limited: bool = True
    """Whether it counts as a hang when it takes too long; else it waits for somebody who is watched himself, or ends by itself."""

    def __str__(self) -> str:
        return f"in step {self.step}: {self.phase}" if self.step else self.phase


class Progress:
    """Written by the training thread, read by others: one reference is replaced at a time."""

    def __init__(self) -> None:
        self.now = Doing(0, "starting", 0, time.monotonic())
        self._renewed = 0.0
        self.waited_s = 0.0
        """For data, since the beginning."""

    def enter(self, phase: str, step: int | None = None, limited: bool = True) -> None:
        """step: the same one where None."""
        self.now = Doing(self.now.step if step is None else step, phase, self.now.count + 1, time.monotonic(), limited)

    def renew(self, *_: object) -> None:
        """There is progress in a long phase. For any thread; what it is told, say how much was read, does not matter."""
        self._renewed = time.monotonic()

    @property
    def standing_s(self) -> float:
        """Seconds since the last sign of progress; 0 in a phase that may take as long as it takes."""
        now = self.now
        return time.monotonic() - max(now.since, self._renewed) if now.limited else 0.0

    def reading(self, batches: Iterator[torch.Tensor], then: str, device: torch.device) -> Iterator[torch.Tensor]:
        """The batches, on `device`; while one is waited for that is what the process does, and after it `then`.

        Copying to a GPU waits for all that it still computes, which is no waiting for data.
        """
        while True:
            self.enter("waiting for data")
            started = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited_s += time.monotonic() - started
            self.enter(then)
            yield batch.to(device)
