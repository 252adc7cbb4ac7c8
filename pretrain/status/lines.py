"""The journal of a run, which may be long: its last lines, and the time of each step in one pass without parsing the rest."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.tracking.journal import decode_line, iterate_lines

TAIL_BYTES = 256 << 10
KEPT = 40
"""Of the last lines."""
HEAD = re.compile(rb'\{"step": (\d+), "timestamp_ms": (\d+)[,}]')
"""How `Journal` begins each line."""
STEP_TIME = b'"perf/step_time_s": '


def tail(path: Path) -> list[dict[str, Any]]:
    """The last complete lines that can be read, oldest first; none where there is no journal. Raises OSError."""
    size, length = path.stat().st_size if path.exists() else 0, TAIL_BYTES
    while size:
        with path.open("rb") as file:
            file.seek(max(0, size - length))
            lines = file.read(length).split(b"\n")
        # The first one is cut where the file begins before it, the last one is not complete yet.
        rows = list(filter(None, map(_row, lines[0 if length >= size else 1 : -1][-KEPT:])))
        if rows or length >= size:
            return rows
        length *= 16
    return []


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = decode_line(line)
    except (ValueError, RecursionError):
        return None
    numbers = row["step"], row["timestamp_ms"]
    return row if all(type(number) is int and 0 <= number < 2**63 for number in numbers) else None


def number(row: dict[str, Any] | None, name: str) -> float | None:
    """A metric of a line; None where it has none."""
    value = (row or {}).get(name)
    return value if type(value) in (int, float) else None


def times(path: Path) -> Iterator[tuple[float, float]]:
    """(when it was written, in seconds since the epoch; seconds that the steps took which it covers) of each line.

    A line covers the steps since the line before and gives their mean. What cannot be read covers nothing. Raises OSError.
    """
    before = None
    for line, _ in iterate_lines(path, 0):
        head = HEAD.match(line)
        if head is None:
            continue
        step, begin = int(head[1]), line.find(STEP_TIME) + len(STEP_TIME)
        # A journal that does not begin with step 0 has lost its beginning: nobody knows what its first line covers.
        steps = step - before if before is not None else step > 0
        seconds = _seconds(line, begin) if begin >= len(STEP_TIME) and steps > 0 else 0.0
        yield int(head[2]) / 1000, steps * seconds
        before = step


def _seconds(line: bytes, begin: int) -> float:
    """The number that begins there; 0 of what is none, or not finite."""
    end = line.find(b",", begin)
    try:
        value = float(line[begin : end if end >= 0 else line.find(b"}", begin)])
    except ValueError:
        return 0.0
    # NaN is not larger either.
    return value if 0 < value < 1e9 else 0.0
