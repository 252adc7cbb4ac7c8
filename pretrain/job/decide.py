"""Whether a job starts the run, and what comes after its end. What is known for certain is in the run directory."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.checkpoint.directory import CheckpointDirectory, step_of
from pretrain.config import PretrainConfig
from pretrain.job import outcome
from pretrain.job.attempts import Attempt
from pretrain.run_directory import STOP_NAME

Kind = Literal["finished", "again", "stopped", "failed"]
FINISHED_NAME = "finished"
"""RUN_DIR/finished: the mark of a run that has reached its last step, for whoever waits for it; holds that step."""


@dataclass(frozen=True)
class Decision:
    """How a job's start of the run ended."""

    kind: Kind
    """finished, again (to be started once more), stopped (on purpose) or failed (for good)."""
    reason: str


def newest_step(config: PretrainConfig) -> int:
    """Of the newest complete checkpoint, by the sizes of its files; 0 without one."""
    directory = CheckpointDirectory(config.run_directory / "checkpoints", config.checkpoint.keep_last, warn=lambda text: None)
    try:
        path = directory.newest(contents=False)
    except (ValueError, OSError):
        # Told by the next start, which looks with the eyes of the run.
        return 0
    return step_of(path) if path is not None else 0


def starts_without_progress(attempts: Sequence[Attempt], chain: str, step: int) -> int:
    """How many starts of these jobs in a row, up to now, ended without a checkpoint behind `step`; preemption is nobody's fault."""
    count = 0
    # Another submission may have been refused in between.
    for attempt in reversed([attempt for attempt in attempts if attempt.chain == chain]):
        if attempt.step != step:
            break
        count += not attempt.preempted
    return count


def give_up(count: int, tries: int, step: int) -> str | None:
    """Why there is no further start; None where there is one."""
    if count < tries:
        return None
    where = f"the newest complete one is of step {step}" if step else "there is none yet"
    return f"{count} starts in a row ended without a new checkpoint ({where}): not started again; mend the cause, then submit the job anew"


def after(
    config: PretrainConfig, status: int, signalled: str, said: outcome.Outcome | None, attempts: Sequence[Attempt], chain: str, tries: int,
    reason: str = "", preempted: bool = False,
) -> Decision:  # fmt: skip
    """What follows from how the training processes ended.

    status: of srun. signalled: what the job had been sent (USR1, TERM, or ""). said: by a process that cannot go on. attempts: with
    the one that has ended, not yet marked as such. reason: why training was not begun. preempted: Slurm took the nodes back.
    """
    step = newest_step(config)
    if step >= config.train.steps:
        return Decision("finished", f"all {config.train.steps} steps are done")
    if stop := stop_file(config):
        return Decision("stopped", f"{stop} is there: remove it and submit the job again to train on from step {step}")
    if said is not None:
        return Decision("failed", said.message)
    ended = reason or (f"{signalled} came" if signalled else f"the training processes ended with status {status}")
    why = f"{ended}; the newest complete checkpoint is of step {step}"
    if preempted:
        return Decision("again", why)
    if given_up := give_up(starts_without_progress(attempts, chain, step), tries, step):
        return Decision("failed", given_up)
    return Decision("again", why)


def stop_file(config: PretrainConfig) -> Path | None:
    """The switch that keeps a run from being trained, where somebody has set it."""
    path = config.run_directory / STOP_NAME
    return path if path.exists() else None
