"""RUN_DIR/slurm/attempts.jsonl: each start of the run by a Slurm job, and how it ended.

One JSON object a line, appended: `begin` before the training processes start, `end` after them. A start without an end was killed, and
preempted where its folder has the mark that slurm/lib/survive.sh leaves.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "slurm"
"""In the run directory: what jobs keep there."""
NAME = "attempts.jsonl"
PREEMPTED_NAME = "preempted"
"""RUN_DIR/slurm/JOB.RESTART/preempted: Slurm took the nodes back; the end may never have been written down."""
SUCCESSOR_NAME = "successor"
"""RUN_DIR/slurm/JOB.RESTART/successor: the number of the job that goes on from this one, where it is another one."""
FORMAT_VERSION = 1


@dataclass(kw_only=True)
class Attempt:
    """One start of the run."""

    job: str
    """Slurm's job id, or "" outside of Slurm."""
    restart: int
    """How often Slurm had started that job before."""
    chain: str = ""
    """What jobs that go on from each other have in common."""
    began: float
    """Seconds since the epoch, of the job's first node."""
    step: int
    """Of the newest complete checkpoint then, 0 without one."""
    nodes: list[str] = field(default_factory=list)
    """Allocated."""
    devices: int = 0
    """Allocated: GPUs, or processes where there are none."""
    processes: int = 0
    """That train; fewer than `devices` where the batch does not divide."""
    ended: float | None = None
    """None: still running, or killed."""
    ended_step: int | None = None
    """Of the newest complete checkpoint at the end."""
    outcome: str = ""
    """finished, again (to be started once more), stopped (on purpose) or failed (for good); "" without an end."""
    preempted: bool = False
    """Slurm took the nodes back."""
    reason: str = ""
    """One sentence."""


def path(run_directory: Path) -> Path:
    return run_directory / FOLDER / NAME


def begin(run_directory: Path, attempt: Attempt) -> None:
    """Note a start. Raises OSError."""
    names = ("job", "restart", "chain", "began", "step", "nodes", "devices", "processes")
    _append(run_directory, {"event": "begin", **{name: getattr(attempt, name) for name in names}})


def end(run_directory: Path, attempt: Attempt) -> None:
    """Note the end of the start with the same job and restart. Raises OSError."""
    names = ("job", "restart", "ended", "ended_step", "outcome", "preempted", "reason")
    _append(run_directory, {"event": "end", **{name: getattr(attempt, name) for name in names}})


def read(run_directory: Path) -> list[Attempt]:
    """All starts, oldest first; none where there is no file. A torn or foreign line is left out. Raises OSError."""
    found: list[Attempt] = []
    known = {item.name for item in dataclasses.fields(Attempt)}
    for line in _lines(path(run_directory)):
        values = {name: value for name, value in line.items() if name in known}
        with contextlib.suppress(TypeError, KeyError, StopIteration):
            if line["event"] == "begin":
                found.append(Attempt(**values))
            else:
                # Another job's start may have begun meanwhile, to be refused.
                which = next(i for i in reversed(range(len(found))) if (found[i].job, found[i].restart) == (line["job"], line["restart"]))
                found[which] = dataclasses.replace(found[which], **values)
    for attempt in found:
        if attempt.ended is None and (run_directory / FOLDER / f"{attempt.job}.{attempt.restart}" / PREEMPTED_NAME).exists():
            attempt.preempted = True
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    try:
        content = file.read_text(errors="replace")
    except FileNotFoundError:
        return
    for text in content.splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and line.get("format_version") == FORMAT_VERSION:
                yield line


def _append(run_directory: Path, line: dict[str, Any]) -> None:
    file = path(run_directory)
    file.parent.mkdir(parents=True, exist_ok=True)
    # A line that a kill cut short stays a line of its own.
    torn = file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
    with file.open("a") as out:
        out.write(("\n" if torn else "") + json.dumps({"format_version": FORMAT_VERSION, **line}) + "\n")
        out.flush()
        os.fsync(out.fileno())
