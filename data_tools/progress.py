"""Progress on standard error: a bar in a terminal, one line every few seconds in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

LOG_INTERVAL_S = 5.0


class Progress:
    """Counts `unit`s up to `total`; use it as a context manager and call `update(amount)`.

    Bytes (`unit="B"`) are shown with binary prefixes. `note` is asked every few seconds for what else is to be shown.
    """

    def __init__(self, description: str, total: int, unit: str = "B", note: Callable[[], str] | None = None) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.note = note
        self.done = 0
        self.start = self.printed = time.monotonic()
        self.bar = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            scale = self.unit == "B"
            self.bar = tqdm(total=self.total, desc=self.description, unit=self.unit, unit_scale=scale, unit_divisor=1024, file=sys.stderr)
        return self

    def update(self, amount: int) -> None:
        """Adds `amount` units that are done."""
        self.done += amount
        if self.bar is not None:
            self.bar.update(amount)
        now = time.monotonic()
        if now - self.printed >= LOG_INTERVAL_S:
            self.printed = now
            note = self.note() if self.note is not None else ""
            if self.bar is not None:
                self.bar.set_postfix_str(note)
                return
            rate = self.done / (now - self.start)
            left = (self.total - self.done) / rate if rate else float("inf")
            percent = 100 * self.done / max(self.total, 1)
            print(
                f"{self.description}: {percent:.0f}% | {format_count(self.done, self.unit)} of {format_count(self.total, self.unit)}"
                f" | {format_count(rate, self.unit)}/s | eta {left:.0f}s{f' | {note}' if note else ''}",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()


def format_count(value: float, unit: str = "") -> str:
    """A number with a prefix that people read: 3.2 MB, 9.4 M."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or prefix == "T":
            break
        value /= 1000
    digits = f"{value:.0f}" if prefix == "" else f"{value:.2f}"
    return f"{digits} {prefix}{unit}".rstrip()


def warn(message: str) -> None:
    """Tells the user something that does not stop the job."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
