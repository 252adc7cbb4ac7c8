"""Going back to a checkpoint from before a loss spike, and on from there behind the samples of the spike.

RUN_DIR/rollbacks.json lists what was decided. It is written before anything else happens, and a checkpoint says which of the
roll-backs it has seen (TrainerState.rollbacks): so a run that is killed at any moment of a roll-back, and one that does it within
its processes, take the same way, `abandoned` and `apply` (pretrain.going_on), to the same state. Imports no torch.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint.content import TrainerRecord
from pretrain.checkpoint.directory import KINDS, CheckpointDirectory, step_of
from pretrain.config import PretrainConfig
from pretrain.tracking.record import write_json

if TYPE_CHECKING:
    from pretrain.trainer import RollBack

FORMAT_VERSION = 1
NAME = "rollbacks.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One roll-back."""

    number: int
    """Counted from 1 over the whole run."""
    spike_begins: int
    """Step."""
    checkpoint_step: int
    """That was gone back to, or, where it turns out damaged, at most to."""
    consumed_samples: int
    """Training goes on with this sample: the first behind the spike."""


def read(run_directory: Path) -> list[Entry]:
    """Oldest first. Raises ValueError where the file is damaged or of a newer version."""
    path = run_directory / NAME
    try:
        content = json.loads(path.read_text())
        if content["format_version"] > FORMAT_VERSION:
            raise ValueError(f"format {content['format_version']} is newer than {FORMAT_VERSION}, the newest this version reads")
        return [Entry(**{"number": i} | entry) for i, entry in enumerate(content["rollbacks"], start=1)]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it; it says which samples the run leaves out") from error


def decide(config: PretrainConfig, directory: CheckpointDirectory, spike: "RollBack") -> str:
    """Write down where to go back to; a sentence that says it. For rank 0.

    Raises ValueError where there were enough roll-backs already, or where no checkpoint is old enough.
    """
    settings, entries = config.spike, read(config.run_directory)
    # The list may have been lost.
    before = max([spike.rollbacks, *(entry.number for entry in entries)])
    if before >= settings.max_rollbacks:
        raise ValueError(
            f"{spike}, after {before} roll-backs (spike.max_rollbacks): lower optimizer.lr and raise spike.max_rollbacks, then start again "
            "with --allow_change optimizer.lr,spike"
        )
    latest = spike.first_step - settings.rollback_steps
    old_enough = [path for path in directory.complete() if step_of(path) <= latest]
    if not old_enough:
        early = latest < config.checkpoint.interval
        raise ValueError(
            f"{spike}, but there is no complete checkpoint of step {latest} or before to go back to: "
            + ("it came too early in the run for that" if early else "see what became of it")
            + "; lower spike.rollback_steps or checkpoint.interval, then start again with --allow_change spike"
        )
    step = step_of(old_enough[-1])
    entries.append(Entry(number=before + 1, spike_begins=spike.first_step, checkpoint_step=step, consumed_samples=spike.consumed_samples))
    write_json(config.run_directory / NAME, {"format_version": FORMAT_VERSION, "rollbacks": [asdict(entry) for entry in entries]})
    return f"roll-back {before + 1} of at most {settings.max_rollbacks}: going back to step {step}"


def abandoned(entries: list[Entry], directory: CheckpointDirectory) -> list[Path]:
    """Checkpoints and milestones between those that were gone back to and the spikes: training takes another way from there."""
    return [path for kind in KINDS if entries for path in directory.complete(kind) if _is_abandoned(path, entries)]


def _is_abandoned(path: Path, entries: list[Entry]) -> bool:
    try:
        unseen = _unseen(entries, TrainerRecord.read(path).state)
    except (ValueError, OSError):
        # What is damaged is told where checkpoints are chosen.
        return False
    return any(step_of(path) > entry.checkpoint_step for entry in unseen)


def apply(entries: list[Entry], state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The state that training goes on from, given a checkpoint's: behind the spikes of the roll-backs that it has not seen.

    With a sentence that says so; "" where there are none.
    """
    unseen = _unseen(entries, state)
    if not unseen:
        return state, ""
    skipped_to = max(entry.consumed_samples for entry in unseen)
    told = (
        f"rolled back to step {state['step']}: samples {state['consumed_samples']:,} to {skipped_to - 1:,}, up to the end of the loss "
        "spike, are left out"
    )
    return state | {"consumed_samples": skipped_to, "rollbacks": unseen[-1].number}, told


def _unseen(entries: list[Entry], state: dict[str, Any]) -> list[Entry]:
    return [entry for entry in entries if entry.number > state.get("rollbacks", 0)]


def forget(run_directory: Path) -> None:
    """The run starts over, from no checkpoint. For rank 0."""
    (run_directory / NAME).unlink(missing_ok=True)
