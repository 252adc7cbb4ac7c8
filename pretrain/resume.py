"""Puts a run where it begins: the newest checkpoint, the weights of `checkpoint.start_from`, or new weights (pretrain.going_on)."""

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_qsparse.parallel import checkpoint
from megatron_qsparse.parallel.checkpoint.saver import GROUP_TIMEOUT
from megatron_qsparse.parallel.zero import ZeroEngine
from pretrain.checkpoint.directory import STATE_NAME, CheckpointDirectory
from pretrain.going_on import Beginning
from pretrain.progress import Progress
from pretrain.trainer import TrainerState


def load(engine: ZeroEngine, beginning: Beginning, directory: CheckpointDirectory) -> TrainerState:
    """Fill the engine; returns where training stands. Collective.

    Raises ValueError where the stored state cannot be used: of another model, newer than this code, or not made by it.
    """
    state = _state(beginning)
    if beginning.checkpoint is not None:
        if not checkpoint.load(engine, beginning.checkpoint / STATE_NAME) and dist.get_rank() == 0:
            directory.warn(
                f"{beginning.checkpoint} was written at another layout, on another kind of device or by an older version: random number "
                "generators start anew (nothing of this project draws from them)"
            )
    elif beginning.weights is not None:
        checkpoint.load_weights(engine, beginning.weights / STATE_NAME)
    return state


def _state(beginning: Beginning) -> TrainerState:
    """Raises ValueError for names and types that no version of this code has written."""
    kinds = {name: type(value) for name, value in dataclasses.asdict(TrainerState()).items()}
    # JSON writes 1.0 as it is, and other writers as 1.
    allowed = {name: (int, float) if kind is float else kind for name, kind in kinds.items()}
    wrong = [name for name, value in beginning.state.items() if not isinstance(value, allowed.get(name, ()))]
    if wrong:
        raise ValueError(f"{beginning.checkpoint}: trainer.json was not written by this project: its state has a wrong {', '.join(wrong)}")
    return TrainerState(**beginning.state)


def of_rank_0(find: Callable[[], Any], progress: Progress, doing: str) -> Any:
    """What rank 0 finds on the disk, on every rank; where it fails, all raise. Collective. doing: told where it fails or hangs."""
    found = [None]
    # The others are told of a hang by rank 0: it may find its way, say through a large checkpoint, for longer than a step may take.
    progress.enter(doing if dist.get_rank() == 0 else f"waiting for rank 0, {doing}", limited=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except (ValueError, OSError) as error:
            # By its words: not every exception survives being sent.
            found = [ValueError(str(error))]
        except Exception:
            # Swallowed by nobody: the other ranks wait in the broadcast below, and all of them raise it with its traceback.
            found = [RuntimeError(f"rank 0 failed {doing}:\n{traceback.format_exc()}")]
    # Rank 0 reads a whole checkpoint: the default group, of NCCL on GPUs, would give up after ten minutes.
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    dist.broadcast_object_list(found, src=0, group=group)
    dist.destroy_process_group(group)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]
