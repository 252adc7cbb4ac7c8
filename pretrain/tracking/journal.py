"""The append-only metrics journal: one JSON object per line, one line per logged step.

    {"step": 12, "timestamp_ms": 1763800000123, "train/loss": 5.0321044921875, "train/lr": 0.0012}

Numbers keep full precision (Python writes the shortest text that reads back to the same float64). JSON has no NaN and
no infinity, so those three values are written as the strings "NaN", "Infinity" and "-Infinity": every line stays valid
JSON for any reader, and `read_journal` turns the strings back into floats.

One line is one `write` to a file opened for appending, so a killed process leaves at most its last line torn. Opening a
journal for writing cuts such a line off; readers ignore it.
"""

from __future__ import annotations

import collections
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

RESERVED_KEYS = ("step", "timestamp_ms")
JOURNAL_ONLY = "experts/"
"""Prefix of metrics that are not shipped: tables with a row for every expert of every layer, thousands of points a step."""
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# Lines kept in memory while the disk refuses them: hours of training at one line a step, a few MB at most.
MAX_LINES_WAITING_FOR_DISK = 10_000


class Journal:
    """The writing end of one journal file. One writer per file; not thread-safe.

    Raises:
        OSError: from the constructor alone, when the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        repair(self.path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._descriptor).st_size
        self._waiting: collections.deque[bytes] = collections.deque(maxlen=MAX_LINES_WAITING_FOR_DISK)
        self._dropped = 0
        self._failing = False

    def append(self, step: int, metrics: Mapping[str, float], timestamp_ms: int | None = None) -> None:
        """Append one line. A disk that is full or failing costs one warning, never an exception.

        Args:
            step: optimizer step (or sample number), >= 0.
            metrics: names and values; anything `float()` accepts. The names "step" and "timestamp_ms" are taken.
            timestamp_ms: milliseconds since the epoch; now when None.

        Raises:
            ValueError: a reserved metric name.
            TypeError: a value that is no number.
        """
        if len(self._waiting) == MAX_LINES_WAITING_FOR_DISK:
            self._dropped += 1
        self._waiting.append(encode_line(step, time.time_ns() // 1_000_000 if timestamp_ms is None else timestamp_ms, metrics))
        self._write_waiting()

    def close(self) -> None:
        """Force the journal to disk and close it. Closing twice is allowed."""
        if self._descriptor < 0:
            return
        if self._waiting:
            self._write_waiting()
        if self._waiting:
            logger.warning("%s: %d lines could not be written and are lost", self.path, len(self._waiting) + self._dropped)
        with suppress(OSError):  # the lines are written; a file system without fsync must not end training
            os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1

    def abandon(self) -> None:
        """Close it without writing anything more."""
        self._waiting.clear()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write_waiting(self) -> None:
        data = b"".join(self._waiting)
        try:
            written = os.write(self._descriptor, data)
            if written < len(data):
                raise OSError(f"wrote {written} of {len(data)} bytes, is the disk full?")
        except OSError as error:
            with suppress(OSError):  # takes back a partial line, so that the next one starts at a line's beginning
                os.ftruncate(self._descriptor, self._size)
            if not self._failing:
                logger.warning("cannot write %s (%s): metrics wait in memory, training goes on", self.path, error)
            self._failing = True
            return
        self._size += written
        if self._failing:
            logger.warning("%s is written again: %d lines caught up, %d lost", self.path, len(self._waiting), self._dropped)
            self._failing, self._dropped = False, 0
        self._waiting.clear()


def encode_line(step: int, timestamp_ms: int, metrics: Mapping[str, float]) -> bytes:
    """One journal line with its newline; see `Journal.append` for arguments and errors."""
    fields: dict[str, Any] = {"step": int(step), "timestamp_ms": timestamp_ms}
    for name, value in metrics.items():
        if name in RESERVED_KEYS:
            raise ValueError(f"a metric cannot be called {name!r}: the journal uses that name itself")
        fields[name] = value if type(value) in (int, float) else float(value)
    try:
        text = json.dumps(fields, allow_nan=False, separators=(", ", ": "))
    except ValueError:
        text = json.dumps({name: _encode_value(value) for name, value in fields.items()})
    return text.encode() + b"\n"


def decode_line(line: bytes) -> dict[str, Any]:
    """The object of one journal line, with non-finite values as floats.

    Raises:
        ValueError: not a journal line.
    """
    fields = json.loads(line)
    if not isinstance(fields, dict) or "step" not in fields or "timestamp_ms" not in fields:
        raise ValueError("a journal line is a JSON object with 'step' and 'timestamp_ms'")
    return {name: NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in fields.items()}


def read_journal(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All lines of a journal in file order; a torn last line is left out.

    Returns:
        dicts with `step` (int), `timestamp_ms` (int) and metric names with int or float values, NaN and infinities
        included.

    Raises:
        FileNotFoundError: there is no such journal.
        ValueError: a line before the last one is damaged; the message names file and line number.
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(decode_line(line))
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
    return rows


def iterate_lines(path: Path, offset: int) -> Iterator[tuple[bytes, int]]:
    """Complete lines from byte `offset` on, each with the offset behind it; nothing for a file that is not there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield line, offset


def first_step(path: Path) -> int | None:
    """Step of the first line; None without a readable one."""
    for line, _ in iterate_lines(path, 0):
        with suppress(ValueError):
            return decode_line(line)["step"]
        break
    return None


def last_timestamp_ms(path: Path) -> int | None:
    """When the last line was written; None without a readable one."""
    last = b""
    for line, _ in iterate_lines(path, 0):
        last = line
    with suppress(ValueError):
        return decode_line(last)["timestamp_ms"]
    return None


def repair(path: Path) -> None:
    """Cut off what a kill or a power loss left behind the last readable line (a torn line, a run of zero bytes)."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = len(data)
    while end > 0:
        start = data.rfind(b"\n", 0, end - 1) + 1
        with suppress(ValueError):
            decode_line(data[start:end])
            break
        end = start
    if end < len(data):
        logger.warning("%s: cut off %d bytes of an unfinished line", path, len(data) - end)
        os.truncate(path, end)
    if end and data[end - 1 : end] != b"\n":
        with path.open("ab") as file:
            file.write(b"\n")


def truncate_after(path: str | os.PathLike[str], step: int) -> int:
    """Cut a journal behind `step`, as a resume from the checkpoint of that step needs.

    Everything from the first line with a larger step on is appended to `<name>.discarded.jsonl` and forced to disk
    there before the journal is cut, so a kill in between loses nothing.

    Returns:
        the journal's size in bytes afterwards.
    """
    path = Path(path)
    repair(path)
    end = 0
    for line, behind in iterate_lines(path, 0):
        with suppress(ValueError):  # a damaged line must not stop a resume; it stays where it is
            if decode_line(line)["step"] > step:
                break
        end = behind
    if not path.exists() or end == path.stat().st_size:
        return end
    with path.open("rb") as file, discarded_path(path).open("ab") as discarded:
        file.seek(end)
        discarded.write(file.read())
        discarded.flush()
        os.fsync(discarded.fileno())
    os.truncate(path, end)
    return end


def discarded_path(path: Path) -> Path:
    """Where `truncate_after` keeps the tail of a journal: metrics.jsonl -> metrics.discarded.jsonl."""
    return path.with_name(f"{path.stem}.discarded{path.suffix}")


def _encode_value(value: float) -> float | str:
    if isinstance(value, int) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
