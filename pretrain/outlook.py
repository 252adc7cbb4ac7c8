"""What `python -m pretrain.plan` says of the run directory: what a start would do there, and whether the disk has room for it.

The decision is the run's own (pretrain.going_on), by the files' sizes instead of every byte. Imports no torch and changes nothing.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.manifest import Manifest
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.memory import checkpoint_bytes
from pretrain.checkpoint.directory import CheckpointDirectory
from pretrain.checkpoint.files import size
from pretrain.config import PretrainConfig
from pretrain.going_on import Beginning, beginning
from pretrain.lease import Lease
from pretrain.run_directory import PROBE_BYTES
from pretrain.tracking.record import RECORD_NAME, RunRecord
from pretrain.validation import spikes

GIB = 2**30


@dataclass
class Outlook:
    """For a run that could start otherwise."""

    rows: list[tuple[str, str]]
    """Of a table."""
    problems: list[str] = field(default_factory=list)
    """Why the run would be refused there."""
    warnings: list[str] = field(default_factory=list)
    complete: bool = False
    """Whether there is nothing left to do."""


def look(config: PretrainConfig, model: ModelConfig, manifest: Manifest) -> Outlook:
    """model: resolved."""
    found = Outlook([("directory", str(config.run_directory))], warnings=spikes.warnings(config))
    directory = CheckpointDirectory(config.run_directory / "checkpoints", config.checkpoint.keep_last, warn=found.warnings.append)
    changes: list[str] = []
    try:
        _look_at_owner(config, found)
        where = beginning(config, model, manifest, directory, changes.append, contents=False)
        if where.checkpoint is not None and (config.run_directory / RECORD_NAME).exists():
            RunRecord.load(config.run_directory)
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
        return found
    found.complete = where.step >= config.train.steps
    found.rows.append(("start", _start(config, where)))
    found.rows += [("changed", line.removeprefix("changed: ")) for line in changes]
    if where.rolled_back:
        found.rows.append(("roll-back", where.rolled_back))
    if not found.complete:
        _look_at_disk(config, model, where, directory, found)
    return found


def _start(config: PretrainConfig, where: Beginning) -> str:
    if where.checkpoint is None:
        return "new, at step 0" + (f", with the weights of {where.weights}" if where.weights else "")
    if where.step >= config.train.steps:
        return f"is complete: {where.step} of {config.train.steps} steps are done, nothing would be trained"
    return f"goes on after step {where.step} of {config.train.steps} from {where.checkpoint}, whose bytes it compares first"


def _look_at_owner(config: PretrainConfig, found: Outlook) -> None:
    lease = Lease(config.run_directory)
    _, owner = lease.newest()
    if owner is None:
        return
    dead = owner.is_dead(lease.owner)
    if dead is False:
        found.problems.append(f"{config.run_directory} is in use by {owner}: end that run, or choose another output_dir")
    elif dead is None:
        found.warnings.append(
            f"{config.run_directory} belongs to {owner}: a start looks for a sign of life for up to {lease.patience_s:.0f} s, and is "
            "refused where there is one"
        )


def _look_at_disk(config: PretrainConfig, model: ModelConfig, where: Beginning, directory: CheckpointDirectory, found: Outlook) -> None:
    """Of what is to come those bytes are there already that the checkpoints of now will make room for."""
    settings, precision, subln = config.checkpoint, config.train.precision, config.bitnet.subln
    # Besides the one being written, with roll-backs one far back that signals' checkpoints would have made way for.
    copies, interval = settings.keep_last + 1 + bool(spikes.reach(config)), settings.milestone_interval
    milestones = config.train.steps // interval - where.step // interval if interval else 0
    needed = copies * checkpoint_bytes(model, precision, subln) + milestones * checkpoint_bytes(model, precision, subln, weights_only=True)
    missing = max(0, needed - sum(map(size, directory.published())))
    free = shutil.disk_usage(_existing(config.run_directory)).free
    what = f"{copies} checkpoints" + (f" and {milestones} more milestones" if milestones else "")
    text = f"{missing / GIB:.3f} GiB more for {what}, {free / GIB:.3f} GiB are free"
    found.rows.append(("disk", text))
    if free < PROBE_BYTES:
        found.problems.append(f"output_dir: {config.run_directory} lies on a disk without any room: free space there, or choose another")
    elif missing > free:
        found.warnings.append(
            f"the disk of {config.run_directory} is too small: {text}; free space there, choose another output_dir, or lower "
            "checkpoint.keep_last" + (" or raise checkpoint.milestone_interval" if milestones else "")
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
