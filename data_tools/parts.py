"""One job on several machines: which units a part of the job works on, and in which order.

Parts share a work folder and nothing else. Units do not depend on each other, and what a unit leaves is the same whoever
does it, so no part waits for another one, which may not be running: each goes through its own stripe of the units first,
and then through whatever the others have not finished. Two parts that do the same unit at the same time lose time, no more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.progress import Progress

if TYPE_CHECKING:
    from data_tools.passes import HashTask, TokenizeTask
    from data_tools.workers import Workers


@dataclass(frozen=True)
class Part:
    """Part `index` of `count`, 0 <= index < count."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From `I/N`. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"{text!r} is not I/N with 0 <= I < N")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def own(self, units: int) -> range:
        """The units of this part's stripe."""
        return range(self.index, units, self.count)

    def others(self, units: int) -> Iterator[int]:
        """All other units, stripe by stripe, each from its end: its own part comes from the beginning.

        Helpers begin at different places, of the stripes as well as within one: where a single stripe is left, they share it.
        """
        for step in range(1, self.count):
            stripe = range((self.index + step) % self.count, units, self.count)[::-1]
            first = len(stripe) * (step - 1) // max(self.count - 1, 1)
            yield from stripe[first:]
            yield from stripe[:first]


def work_through(
    part: Part,
    function: Callable[[HashTask | TokenizeTask], int],
    tasks: Sequence[HashTask | TokenizeTask],
    pool: Workers,
    journals: Path,
    description: str,
) -> None:
    """Does whatever of `tasks`, one for each unit, is not done yet. `function` skips a unit whose journal is there.

    `journals`: folder of the pass, for the progress of all parts.
    """

    def of_all_parts() -> str:
        done = sum(path.suffix == ".npz" for path in journals.iterdir())
        return f"all parts: {done} of {len(tasks)} units"

    stages = {
        f"{description}, part {part}": part.own(len(tasks)),
        f"{description}, what other parts have not done": part.others(len(tasks)),
    }
    for title, indices in stages.items():
        mine = [tasks[index] for index in indices]
        with Progress(title, sum(task.unit.input_bytes for task in mine), note=of_all_parts) as progress:
            for size in pool.map(function, mine):
                progress.update(size)
