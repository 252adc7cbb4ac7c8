"""The copy in host memory that a save writes, while training goes on and changes the originals."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from megatron_qsparse.parallel.checkpoint import rng
from megatron_qsparse.parallel.checkpoint.adam import adam_step, create_adam_state
from megatron_qsparse.parallel.checkpoint.places import Place, places
from megatron_qsparse.parallel.checkpoint.spread import STATES, WEIGHT, Spread, part_of, spreads
from megatron_qsparse.parallel.zero import ZeroEngine

FORMAT_VERSION = 3
"""1: no generator states, and neither layout nor content in common.pt. 2: generator states as pickled objects, which are not read."""


@dataclass(frozen=True)
class Share:
    """This rank's part of a tensor that no rank holds whole."""

    spread: Spread
    kind: str
    """One of `STATES`, or `WEIGHT`."""
    part: torch.Tensor
    """A copy in host memory."""


@dataclass
class Snapshot:
    """What this rank writes, and its shares of what is still to be put together."""

    weights: list[ShardedTensor]
    states: list[ShardedTensor]
    """Master weights and moments; empty where only weights were asked for."""
    generators: list[ShardedTensor]
    """States of the random number generators, one vector of bytes; empty likewise."""
    common: dict[str, Any]
    """Rank 0's is written."""
    shares: deque[Share] = field(default_factory=deque)

    @property
    def nbytes(self) -> int:
        """Of the tensors that this rank writes."""
        missing = (share.spread.place.numel * share.part.itemsize for share in self.shares if share.spread.is_writer)
        return sum(piece.data.nbytes for piece in (*self.weights, *self.states)) + sum(missing)

    @torch.no_grad()
    def assemble(self, group: dist.ProcessGroup) -> None:
        """Put the shared tensors together, one by one. Collective over `group`, a gloo group of all ranks.

        A share is let go when its tensor is there, so beyond what the rank writes this needs about one tensor, and two where it is
        stored in pieces.
        """
        while self.shares:
            share = self.shares.popleft()
            whole = share.spread.gather(share.part, group)
            if whole is not None:
                place = share.spread.place
                pieces = place.cut(whole.view(place.shape), _prefix(share.kind))
                (self.weights if share.kind == WEIGHT else self.states).extend(map(_on_its_own, pieces))


class Copier:
    """Takes snapshots of one engine; finds out once what lies where."""

    def __init__(self, engine: ZeroEngine):
        self.engine = engine
        self.places = places(engine.model)
        self.spreads = spreads(engine, self.places)

    @torch.no_grad()
    def snapshot(self, optimizer: bool) -> Snapshot:
        """optimizer: with master weights, moments and generator states. Needs nothing besides what it returns."""
        engine = self.engine
        taken = Snapshot([], [], [], common(engine, optimizer))
        for place in self.places:
            if not place.is_parameter and not any(_as_tuple(place.sharded.replica_id)):
                taken.weights += _copies(place, place.tensor)
        if optimizer:
            create_adam_state(engine, adam_step(engine))
            states = rng.encode(rng.states(engine.device))
            taken.generators.append(ShardedTensor.from_rank_offsets(rng.key(dist.get_rank()), states))
        # Kind by kind: the writers change from parameter to parameter, and so, as shares are put together, what a rank receives
        # stays near what it lets go. All kinds of one parameter in turn need half a tensor more for each kind.
        for kind in (WEIGHT, *STATES) if optimizer else (WEIGHT,):
            for spread in self.spreads:
                # What is no first copy, is none on all ranks of the spread.
                if spread.place.is_first_copy:
                    self._take(taken, spread, kind)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return taken

    def _take(self, taken: Snapshot, spread: Spread, kind: str) -> None:
        """Copy one tensor where this rank has it whole and writes it, or this rank's share where no rank has it whole."""
        local = kind == WEIGHT and self.engine.stage < 3
        if local or spread.writer_has_all:
            if spread.is_writer:
                whole = spread.place.tensor.data if local else part_of(self.engine, spread, kind)
                pieces = _copies(spread.place, whole.view(spread.place.shape), _prefix(kind))
                (taken.weights if kind == WEIGHT else taken.states).extend(pieces)
        elif spread.span[1] or spread.is_writer:
            taken.shares.append(Share(spread, kind, _on_host(part_of(self.engine, spread, kind))))


def _prefix(kind: str) -> str:
    return "" if kind == WEIGHT else f"optimizer.{kind}."


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
        piece.data = _on_host(piece.data)
    return pieces


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    # From a GPU in stream order, before the next optimizer step; the caller waits for the stream.
    return copy.copy_(tensor, non_blocking=True)


def _on_its_own(piece: ShardedTensor) -> ShardedTensor:
    """With memory that holds nothing else."""
    if piece.data.untyped_storage().nbytes() != piece.data.nbytes:
        piece.data = piece.data.clone()
    return piece


def _as_tuple(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    return (replica_id,) if isinstance(replica_id, int) else replica_id
