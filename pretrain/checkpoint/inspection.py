"""What can be said about a checkpoint without loading it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_qsparse.parallel.metadata import read_contents
from pretrain.checkpoint import files
from pretrain.checkpoint.content import CONFIG_NAME, TrainerRecord, read_settings
from pretrain.checkpoint.directory import KINDS, PARTIAL, REMOVED, STATE_NAME, CheckpointDirectory, is_one, kind_of, step_of


class NoCheckpoint(ValueError):
    """The path names no checkpoint; the message says what would."""


@dataclass(frozen=True)
class Summary:
    """One line of `list`."""

    name: str
    kind: str
    step: int
    created: str
    """ISO 8601 with the offset of the time zone; by the file's time where files.json has none."""
    size: int
    """Bytes."""
    state: str
    """"complete" (every file is there with its size), "damaged: ...", "unfinished" or "being removed"."""
    resume_point: bool = False
    """Whether a run would go on from here: the newest complete step, if its files still hold what was written."""


def checkpoints_directory(path: Path) -> Path:
    """The checkpoints directory of a run directory, or the path itself where it is one. Raises NoCheckpoint."""
    for candidate in (path / "checkpoints", path):
        if candidate.is_dir() and any(kind_of(_published_name(child)) for child in candidate.iterdir()):
            return candidate
    reason = "holds no checkpoints" if path.is_dir() else "is no directory"
    raise NoCheckpoint(f"{path} {reason}: name a run directory, its checkpoints/ folder, or one checkpoint in it")


def checkpoints(path: Path) -> list[Path]:
    """The checkpoint at this path, or all published ones below it, milestones last. Raises NoCheckpoint."""
    path = path.resolve()
    if is_one(path):
        return [path]
    directory = CheckpointDirectory(checkpoints_directory(path), keep_last=1)
    found = [checkpoint for kind in KINDS for checkpoint in directory.published(kind)]
    if not found:
        raise NoCheckpoint(f"{path} holds no finished checkpoint: choose another run directory")
    return found


def one_checkpoint(path: Path, warn: Callable[[str], None] = lambda text: None) -> Path:
    """The checkpoint at this path, or the newest that is complete by its files' sizes. Raises NoCheckpoint.

    Newest is what was written last: a run that went back to an earlier checkpoint has left milestones of later steps behind.
    warn: told of newer ones that are damaged.
    """
    found = checkpoints(path)
    for checkpoint in _newest_first(found):
        damage = files.damage(checkpoint)
        if damage is None:
            return checkpoint
        if checkpoint == path.resolve():
            raise NoCheckpoint(f"{path} is damaged: {damage}: choose another checkpoint, or copy this one again")
        warn(f"{checkpoint} is damaged ({damage}); looking for the one before it")
    raise NoCheckpoint(f"{path}: every checkpoint is damaged; see `python -m pretrain.checkpoint verify {path}`")


def summaries(path: Path) -> list[Summary]:
    """Of all checkpoints at or below the path, unfinished ones included; by step."""
    path = path.resolve()
    found = list(checkpoints(path)) if is_one(path) else [child for child in checkpoints_directory(path).iterdir() if child.is_dir()]
    known = [child for child in found if kind_of(_published_name(child))]
    summaries = sorted(filter(None, map(_summary, known)), key=lambda summary: (summary.step, summary.name))
    newest = resume_point(path.parent if is_one(path) else checkpoints_directory(path))
    return [replace(summary, resume_point=newest is not None and summary.name == newest.name) for summary in summaries]


def resume_point(directory: Path) -> Path | None:
    """The newest step in a checkpoints directory that is complete by its files' sizes."""
    complete = CheckpointDirectory(directory, keep_last=1).complete()
    return complete[-1] if complete else None


def _summary(path: Path) -> Summary | None:
    """None where a run at work has published or removed it in the meantime."""
    published = _published_name(path)
    if path.name.endswith(REMOVED):
        state = "being removed"
    elif path != published:
        state = "unfinished"
    else:
        damage = files.damage(path)
        state = "complete" if damage is None else f"damaged: {damage}"
    try:
        summary = Summary(path.name, kind_of(published), step_of(published), _created(path), files.size(path), state)
    except FileNotFoundError:
        return None
    return summary if path.is_dir() else None


def _newest_first(found: list[Path]) -> list[Path]:
    """By when their step was saved, to the second; of one step the whole state before the milestone, which is sealed after it."""
    saved: dict[int, datetime] = {}
    for path in found:
        try:
            created = datetime.fromisoformat(_created(path))
        except (FileNotFoundError, ValueError):
            # Removed meanwhile by a run at work.
            created = datetime.fromtimestamp(0, UTC)
        saved[step_of(path)] = max(created, saved.get(step_of(path), created))
    return sorted(found, key=lambda path: (saved[step_of(path)], step_of(path), kind_of(path) == "step"), reverse=True)


def _created(path: Path) -> str:
    try:
        return files.read(path)["created"]
    except (OSError, ValueError, KeyError):
        return datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")


def _published_name(path: Path) -> Path:
    name, _, suffix = path.name.partition(".")
    return path.with_name(name) if f".{suffix}".endswith((PARTIAL, REMOVED)) else path


def description(checkpoint: Path) -> dict[str, Any]:
    """Everything that `show` prints, as plain values.

    Raises ValueError or OSError where the checkpoint is damaged or newer than this code.
    """
    record = TrainerRecord.read(checkpoint)
    settings = read_settings(checkpoint / CONFIG_NAME)
    kept = {name.removeprefix("kept."): value for name, value in record.identity.items() if name.startswith("kept.")}
    return {
        "checkpoint": str(checkpoint),
        "kind": kind_of(checkpoint),
        "created": _created(checkpoint),
        "run_id": record.run_id,
        "numerics_version": record.numerics_version,
        "state": record.state,
        "layout": record.layout | _layout_settings(settings),
        "tracking_enabled": settings.get("tracking.enabled", True),
        "identity": {name: value for name, value in record.identity.items() if not name.startswith("kept.")},
        "kept": {name: {"k": k, "groups": groups, "width": width} for name, (k, groups, width) in kept.items()},
        "tensors": _tensors(checkpoint / STATE_NAME),
    }


def _layout_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What the processes alone do not tell of a layout; absent where the version that wrote it did not know the setting."""
    names = {"virtual_pipeline": "parallel.virtual_pipeline", "sequence": "parallel.sequence", "recompute": "train.recompute"}
    return {name: settings[setting] for name, setting in names.items() if setting in settings}


def unreadable(checkpoint: Path) -> str | None:
    """Why the table of its tensors cannot be read, although every byte is what was written; None where it can."""
    try:
        read_contents(checkpoint / STATE_NAME)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _tensors(state: Path) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every stored tensor by its name on disk, generator states apart; layers are stacked along the first axis."""
    tensors = read_contents(state).tensors
    return {name: {"shape": list(item.size), "dtype": item.dtype} for name, item in sorted(tensors.items()) if not name.startswith("rng.")}
