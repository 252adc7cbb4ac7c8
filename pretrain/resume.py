"""Which weights a process begins with: those of the run's newest checkpoint, those of `checkpoint.start_from`, or new ones."""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qsparse.parallel import checkpoint
from megatron_qsparse.parallel.checkpoint.saver import GROUP_TIMEOUT
from megatron_qsparse.parallel.zero import ZeroEngine
from pretrain import rollback
from pretrain.changes import compare
from pretrain.checkpoint.content import CONFIG_NAME, TrainerRecord
from pretrain.checkpoint.directory import STATE_NAME, CheckpointDirectory, step_of
from pretrain.checkpoint.files import damage
from pretrain.identity import NUMERICS_VERSION, differences, identity
from pretrain.start import source
from pretrain.trainer import TrainerState
from pretrain.validate import Validated


def resume(engine: ZeroEngine, directory: CheckpointDirectory, run: Validated) -> TrainerState | None:
    """Load the newest complete checkpoint into the engine; None where there is none yet. Collective.

    Raises ValueError where it belongs to another run, naming each difference, where settings have changed that must not change
    unnoticed, where every checkpoint is damaged, and where `resume` asks for something else.
    """
    found = of_rank_0(lambda: _newest(directory, run))
    if found is None:
        return None
    path, state = found
    if not checkpoint.load(engine, path / STATE_NAME) and dist.get_rank() == 0:
        directory.warn(
            f"{path} was written at another layout or on another kind of device: random number generators start anew "
            "(nothing of this project draws from them)"
        )
    return TrainerState(**rollback.apply(run, state, lambda text: print(text, flush=True) if dist.get_rank() == 0 else None))


def start(engine: ZeroEngine, directory: CheckpointDirectory, run: Validated) -> Path | None:
    """Load the weights of `checkpoint.start_from` into the engine; None where that is not set. Collective.

    Raises ValueError where the checkpoint is damaged.
    """
    path = of_rank_0(lambda: _source(directory, run))
    if path is not None:
        checkpoint.load_weights(engine, path / STATE_NAME)
    return path


def of_rank_0(find: Callable[[], Any]) -> Any:
    """What rank 0 finds on the disk, on every rank; where it fails, all raise. Collective."""
    found = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except (ValueError, OSError) as error:
            # By its words: not every exception survives being sent.
            found = [ValueError(str(error))]
        except Exception:
            # Swallowed by nobody: the other ranks wait in the broadcast below, and all of them raise it with its traceback.
            found = [RuntimeError(f"rank 0 failed while it looked for a checkpoint:\n{traceback.format_exc()}")]
    # Rank 0 reads a whole checkpoint: the default group, of NCCL on GPUs, would give up after ten minutes.
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    dist.broadcast_object_list(found, src=0, group=group)
    dist.destroy_process_group(group)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _source(directory: CheckpointDirectory, run: Validated) -> Path | None:
    path = source(run.config)
    if path is not None:
        if problem := damage(path, contents=True):
            raise ValueError(f"checkpoint.start_from: {path} is not a complete checkpoint ({problem})")
        _compare_numerics(path, TrainerRecord.read(path), directory)
    return path


def _newest(directory: CheckpointDirectory, run: Validated) -> tuple[Path, dict] | None:
    """(path, state) of the checkpoint to go on from."""
    if run.config.resume == "never" and directory.published():
        raise ValueError(f"{directory.path} holds checkpoints and resume=never: choose another output_dir, or leave resume out")
    rollback.remove_left_behind(run, directory)
    path = directory.newest()
    if path is None:
        rollback.forget(run)
    if path is None and run.config.resume == "required":
        raise ValueError(f"{directory.path} holds no checkpoint and resume=required: is output_dir right?")
    if path is None:
        if milestones := directory.published("milestone"):
            last = step_of(milestones[-1])
            raise ValueError(
                f"{directory.path} holds milestones, the last of step {last}, but no checkpoint to go on from, and a run from step 0 "
                "would replace them: choose another output_dir (checkpoint.start_from takes a milestone's weights)"
            )
        return None
    saved = TrainerRecord.read(path)
    if found := differences(saved.identity, json.loads(json.dumps(identity(run)))):
        lines = "\n".join(f"  {line}" for line in found)
        raise ValueError(f"{path} belongs to a different run:\n{lines}\nchoose another output_dir, or restore these settings")
    for line in compare(path / CONFIG_NAME, run.config):
        print(line, flush=True)
    _compare_numerics(path, saved, directory)
    return path, saved.state


def _compare_numerics(path: Path, saved: TrainerRecord, directory: CheckpointDirectory) -> None:
    if saved.numerics_version != NUMERICS_VERSION:
        directory.warn(
            f"{path} was trained with numerics version {saved.numerics_version}, this is {NUMERICS_VERSION}: losses may shift here, "
            "see CHANGELOG.md"
        )
