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

    def __str__(self) -> str:
        return f"in step {self.step}: {self.phase}" if self.step else self.phase


class Progress:
    """Written by the training thread, read by others: one reference is replaced at a time."""

    def __init__(self) -> None:
        self.now = Doing(0, "starting", 0, time.monotonic())

    def enter(self, phase: str, step: int | None = None) -> None:
        """step: the same one where None."""
        self.now = Doing(self.now.step if step is None else step, phase, self.now.count + 1, time.monotonic())

    def reading(self, batches: Iterator[torch.Tensor], then: str) -> Iterator[torch.Tensor]:
        """The same batches; while one is waited for that is what the process does, and after it `then`."""
        while True:
            self.enter("waiting for data")
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.enter(then)
            yield batch
