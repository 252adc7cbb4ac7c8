"""The copy in host memory that a save writes, while training goes on and changes the originals."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_qsparse.parallel.checkpoint import rng
from megatron_qsparse.parallel.checkpoint.adam import adam_step, create_adam_state
from megatron_qsparse.parallel.checkpoint.places import Place, places
from megatron_qsparse.parallel.checkpoint.spread import STATES, WEIGHT, Spread, part_of, spreads
from megatron_qsparse.parallel.zero import ZeroEngine

FORMAT_VERSION = 2
"""1: no generator states, and neither layout nor content in common.pt."""


@dataclass
class Snapshot:
    """What this rank writes, and only that: tensors that other ranks write are not kept."""

    weights: list[ShardedTensor]
    states: list[ShardedTensor]
    """Master weights and moments; empty where only weights were asked for."""
    objects: list[ShardedObject]
    common: dict[str, Any]
    """Rank 0's is written."""

    @property
    def nbytes(self) -> int:
        return sum(piece.data.nbytes for piece in (*self.weights, *self.states))


class Copier:
    """Takes snapshots of one engine; finds out once what lies where."""

    def __init__(self, engine: ZeroEngine):
        self.engine = engine
        self.places = places(engine.model)
        self.spreads = spreads(engine, self.places)

    @torch.no_grad()
    def snapshot(self, optimizer: bool) -> Snapshot:
        """Collective. optimizer: with master weights, moments and generator states. Needs, besides what it returns, one tensor."""
        engine = self.engine
        taken = Snapshot([], [], [], common(engine, optimizer))
        for place in self.places:
            if not place.is_parameter and not any(_as_tuple(place.sharded.replica_id)):
                taken.weights += _copies(place, place.tensor)
        if optimizer:
            create_adam_state(engine, adam_step(engine))
            world, rank = dist.get_world_size(), dist.get_rank()
            taken.objects.append(ShardedObject("rng", rng.states(), (world,), (rank,)))
        sending: list[dist.Work] = []
        for spread in self.spreads:
            taken.weights += self._kept(spread, WEIGHT, sending)
            for kind in STATES if optimizer else ():
                taken.states += self._kept(spread, kind, sending)
        for request in sending:
            request.wait()
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return taken

    def _kept(self, spread: Spread, kind: str, sending: list[dist.Work]) -> list[ShardedTensor]:
        """Copies of one tensor where this rank writes it. The whole tensor is gone when this returns."""
        if kind == WEIGHT and self.engine.stage < 3:
            whole = spread.place.tensor.data
        else:
            whole = spread.gather(part_of(self.engine, spread, kind), sending)
        if not spread.is_writer or not spread.place.is_first_copy:
            return []
        return _copies(spread.place, whole.view(spread.place.shape), "" if kind == WEIGHT else f"optimizer.{kind}.")


def common(engine: ZeroEngine, optimizer: bool) -> dict[str, Any]:
    """Content of common.pt."""
    return {
        "format_version": FORMAT_VERSION,
        "content": "everything" if optimizer else "weights",
        "adam_step": adam_step(engine),
        "layout": layout(engine),
        # Rank 0 writes this: the seed its generator started from.
        "seed": torch.initial_seed(),
    }


def layout(engine: ZeroEngine) -> dict[str, int]:
    """How the model is spread over the processes now."""
    return {
        "processes": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "zero_stage": engine.stage,
    }


def _copies(place: Place, whole: torch.Tensor, prefix: str = "") -> list[ShardedTensor]:
    """The pieces, each with host memory of its own: the writer would clone a view of something larger.

    For tensors of a GPU that memory is page-locked. torch's host allocator rounds each piece up to a power of two and keeps it
    for the next save: a process holds up to twice what it writes from its first save on.
    """
    pieces = list(place.cut(whole, prefix))
    for piece in pieces:
        copy = torch.empty(piece.data.shape, dtype=piece.data.dtype, pin_memory=piece.data.is_cuda)
        # From a GPU in stream order, behind the gather and before the next optimizer step; the caller waits for the stream.
        piece.data = copy.copy_(piece.data, non_blocking=True)
    return pieces


def _as_tuple(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    return (replica_id,) if isinstance(replica_id, int) else replica_id
