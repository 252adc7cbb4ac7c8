"""All that a run directory says of its run. What is damaged is told in a line and left out."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from pretrain import rollback
from pretrain.checkpoint import files
from pretrain.checkpoint.content import CONFIG_NAME, read_settings
from pretrain.checkpoint.directory import CheckpointDirectory, step_of
from pretrain.job import attempts as account
from pretrain.job.attempts import Attempt
from pretrain.lease import FOLDER, PATIENCE_S, Lease, Owner
from pretrain.status.lines import tail, times
from pretrain.tracking.journal import discarded_path
from pretrain.tracking.record import RECORD_NAME, RunRecord
from pretrain.tracking.state import METRICS_NAME, STATE_NAME, SYSTEM_NAME, unshipped_points

MARKS = (RECORD_NAME, METRICS_NAME, CONFIG_NAME, "checkpoints", FOLDER, f"{account.FOLDER}/{account.NAME}")
"""A directory with one of these is a run's; this project's checkout has a slurm/ as well."""
DAMAGED = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)
"""What reading a file that anybody may have cut or changed can end in."""
T = TypeVar("T")


class NoRun(ValueError):
    """The path is no run directory; the message says so."""


@dataclass(kw_only=True)
class Facts:
    """Times are in seconds since the epoch."""

    directory: Path
    attempts: list[Attempt] = field(default_factory=list)
    """Under Slurm, oldest first."""
    successors: list[str] = field(default_factory=list)
    """Numbers of the jobs that may go on from the last attempt, where that is not its own: one that it has submitted, its array."""
    record: RunRecord | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """Flat, of config.yaml."""
    owner: Owner | None = None
    alive: bool = False
    """Whether the owner is at work, by what can be seen from here: its process, else its heartbeat."""
    beat: float | None = None
    """The owner's last one, by the file's time."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The last lines of the journal."""
    lines: list[tuple[float, float]] = field(default_factory=list)
    """When each line of the journal was written, and the seconds of its steps."""
    thrown_away: list[float] = field(default_factory=list)
    """When a roll-back or a restart threw away steps, and when those were journaled."""
    signs: list[float] = field(default_factory=list)
    """Of life: journaled lines that count or do not, checkpoints, a heartbeat."""
    checkpoint_step: int | None = None
    """The newest complete one, by its files' sizes."""
    checkpoint_time: float | None = None
    rollbacks: int = 0
    unshipped: int | None = None
    """Points that MLflow lacks; None where it is not asked, or the run is not tracked."""
    problems: list[str] = field(default_factory=list)

    @property
    def began(self) -> float | None:
        """When the process that owns the directory, or owned it last without an end, began."""
        with contextlib.suppress(*DAMAGED):
            return datetime.fromisoformat(self.owner.since).timestamp()
        return None

    @property
    def steps(self) -> int | None:
        """That are to be trained."""
        return self.whole("train.steps")

    def whole(self, name: str, default: int | None = None) -> int | None:
        """A setting that is a number of things."""
        value = self.settings.get(name)
        return value if type(value) is int and value >= 0 else default


def is_run(directory: Path) -> bool:
    """Whether it looks like a run directory."""
    try:
        return directory.is_dir() and any((directory / mark).exists() for mark in MARKS)
    except OSError:
        return False


def read(directory: Path, now: float, counting: bool = False) -> Facts:
    """counting: what MLflow lacks as well, which takes longer. Raises NoRun."""
    try:
        empty = not any(directory.iterdir())
    except OSError as error:
        raise NoRun(f"{directory} cannot be read as a run directory ({error.strerror}): name the output_dir of a run") from error
    if not empty and not is_run(directory):
        raise NoRun(f"{directory} is no run directory, since it holds none of {', '.join(MARKS)}: name the output_dir of a run")
    facts = Facts(directory=directory)
    facts.settings = _try(facts, CONFIG_NAME, {}, lambda: _settings(directory))
    facts.record = _try(facts, RECORD_NAME, None, lambda: _record(directory))
    facts.attempts = _try(facts, account.FOLDER, [], lambda: [attempt for attempt in account.read(directory) if _usable(attempt)])
    facts.successors = _try(facts, account.FOLDER, [], lambda: _successors(directory, facts.attempts))
    facts.rollbacks = _try(facts, rollback.NAME, 0, lambda: len(rollback.read(directory)))
    facts.rows = _try(facts, METRICS_NAME, [], lambda: tail(directory / METRICS_NAME))
    _try(facts, FOLDER, None, lambda: _look_at_owner(facts, now))
    _try(facts, "checkpoints", None, lambda: _look_at_checkpoints(facts))
    facts.lines = _try(facts, METRICS_NAME, [], lambda: list(times(directory / METRICS_NAME)))
    facts.signs += [when for when, _ in facts.lines]
    discarded = discarded_path(directory / METRICS_NAME)
    facts.thrown_away = [when for when, _ in _try(facts, discarded.name, [], lambda: list(times(discarded)))]
    with contextlib.suppress(OSError):
        facts.thrown_away.append((directory / rollback.NAME).stat().st_mtime)
    if facts.attempts:
        facts.signs += facts.thrown_away
        facts.signs += [row["timestamp_ms"] / 1000 for row in _try(facts, SYSTEM_NAME, [], lambda: tail(directory / SYSTEM_NAME))]
    if counting and facts.record is not None and facts.settings.get("tracking.enabled") is not False:
        facts.unshipped = _try(facts, STATE_NAME, None, lambda: unshipped_points(directory))
    return facts


def _successors(directory: Path, attempts: list[Attempt]) -> list[str]:
    if not attempts:
        return []
    last = attempts[-1]
    try:
        told = (directory / account.FOLDER / f"{last.job}.{last.restart}" / account.SUCCESSOR_NAME).read_text().split()[:1]
    except FileNotFoundError:
        told = []
    return [number for number in (*told, last.chain) if number != last.job]


def _try(facts: Facts, name: str, otherwise: T, action: Callable[[], T]) -> T:
    """What it returns, or `otherwise` where that cannot be read, which is told. name: of the file or folder that it reads."""
    try:
        return action()
    except DAMAGED as error:
        told = " ".join(str(error).split()) or type(error).__name__
        path = str(facts.directory / name)
        problem = told if path in told else f"{path} cannot be read ({told})"
        if problem not in facts.problems:
            facts.problems.append(problem)
        return otherwise


def _settings(directory: Path) -> dict[str, Any]:
    try:
        return read_settings(directory / CONFIG_NAME)
    except FileNotFoundError:
        return {}


def _record(directory: Path) -> RunRecord | None:
    try:
        record = RunRecord.load(directory)
    except FileNotFoundError:
        return None
    numbers = [record.started_ms, 0 if record.ended_ms is None else record.ended_ms]
    if not all(type(value) is int for value in numbers) or not isinstance(record.journal_bytes_at_resume, list):
        raise ValueError(f"{directory / RECORD_NAME} cannot be read (it holds what no run writes): restore it")
    return record


def _usable(attempt: Attempt) -> bool:
    numbers = [attempt.began, attempt.devices, attempt.processes, attempt.restart, *([] if attempt.ended is None else [attempt.ended])]
    texts = [attempt.job, attempt.outcome, attempt.reason, *attempt.nodes]
    return all(type(value) in (int, float) for value in numbers) and all(isinstance(value, str) for value in texts)


def _look_at_owner(facts: Facts, now: float) -> None:
    lease = Lease(facts.directory)
    number, facts.owner = lease.newest()
    if facts.owner is None:
        return
    with contextlib.suppress(FileNotFoundError):
        facts.beat = (lease.folder / f"{number:06d}.json").stat().st_mtime
        facts.signs.append(facts.beat)
    dead = facts.owner.is_dead(lease.owner)
    facts.alive = not dead if dead is not None else facts.beat is not None and now - facts.beat < PATIENCE_S


def _look_at_checkpoints(facts: Facts) -> None:
    directory = CheckpointDirectory(facts.directory / "checkpoints", keep_last=1, warn=facts.problems.append)
    for path in directory.published():
        with contextlib.suppress(*DAMAGED):
            facts.signs.append(path.stat().st_mtime)
    newest = directory.newest(contents=False)
    if newest is not None:
        facts.checkpoint_step = step_of(newest)
        try:
            facts.checkpoint_time = datetime.fromisoformat(files.read(newest)["created"]).timestamp()
        except DAMAGED:
            # Of format 1, or just removed.
            with contextlib.suppress(OSError):
                facts.checkpoint_time = newest.stat().st_mtime
