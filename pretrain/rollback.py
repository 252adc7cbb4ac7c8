"""Going back to a checkpoint from before a loss spike, and on from there behind the samples of the spike.

RUN_DIR/rollbacks.json lists what was decided. It is written before anything else happens, and a checkpoint says how many of the
roll-backs it has seen (TrainerState.rollbacks): so a run that is killed at any moment of a roll-back, and one that does it within
its processes, take the same way, `apply`, to the same state.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.content import TrainerRecord
from pretrain.checkpoint.directory import CheckpointDirectory, remove, step_of
from pretrain.tracking.record import write_json
from pretrain.trainer import RollBack
from pretrain.validate import Validated

FORMAT_VERSION = 1
NAME = "rollbacks.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One roll-back."""

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
        return [Entry(**entry) for entry in content["rollbacks"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it; it says which samples the run leaves out") from error


def decide(run: Validated, directory: CheckpointDirectory, spike: RollBack) -> str:
    """Write down where to go back to; a sentence that says it. For rank 0.

    Raises ValueError where there were enough roll-backs already, or where no checkpoint is old enough.
    """
    settings, entries = run.config.spike, read(run.config.run_directory)
    if len(entries) >= settings.max_rollbacks:
        raise ValueError(f"{spike}, after {len(entries)} roll-backs (spike.max_rollbacks): lower optimizer.lr, then start again")
    latest = spike.first_step - settings.rollback_steps
    old_enough = [path for path in directory.complete() if step_of(path) <= latest]
    if not old_enough:
        raise ValueError(
            f"{spike}, but no complete checkpoint of step {latest} or before is left to go back to: raise checkpoint.keep_last or "
            "lower spike.rollback_steps or checkpoint.interval"
        )
    step = step_of(old_enough[-1])
    entries.append(Entry(spike_begins=spike.first_step, checkpoint_step=step, consumed_samples=spike.consumed_samples))
    write_json(run.config.run_directory / NAME, {"format_version": FORMAT_VERSION, "rollbacks": [asdict(entry) for entry in entries]})
    return f"roll-back {len(entries)} of at most {settings.max_rollbacks}: going back to step {step}"


def remove_left_behind(run: Validated, directory: CheckpointDirectory) -> None:
    """Remove the checkpoints between those that were gone back to and the spikes. For rank 0."""
    entries = read(run.config.run_directory)
    for path in directory.complete() if entries else ():
        unseen = entries[TrainerRecord.read(path).state.get("rollbacks", 0) :]
        if any(step_of(path) > entry.checkpoint_step for entry in unseen):
            remove(path)


def apply(run: Validated, state: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The state that training goes on from, given a checkpoint's: behind the spikes of the roll-backs that it has not seen."""
    entries = read(run.config.run_directory)
    seen = state.get("rollbacks", 0)
    if len(entries) <= seen:
        return state
    skipped_to = max(entry.consumed_samples for entry in entries[seen:])
    say(
        f"rolled back to step {state['step']}: samples {state['consumed_samples']:,} to {skipped_to - 1:,}, up to the end of the loss "
        "spike, are left out"
    )
    return state | {"consumed_samples": skipped_to, "rollbacks": len(entries)}


def forget(run: Validated) -> None:
    """The run starts over, from no checkpoint. For rank 0."""
    (run.config.run_directory / NAME).unlink(missing_ok=True)
