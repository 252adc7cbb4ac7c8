"""What ZeRO keeps where: each parameter's tensors over the ranks of its data-parallel group, put together and taken apart.

One rank of the group writes a parameter and reads it again. Stages 1 and 2 cut the concatenation of all parameters into equal
parts, so nearly every parameter lies whole on one rank: that one writes it and nothing is sent. Stage 3 cuts each parameter
into equal parts: the ranks take turns.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_qsparse.compat import deepspeed
from megatron_qsparse.parallel.checkpoint.adam import MOMENTS
from megatron_qsparse.parallel.checkpoint.places import Place
from megatron_qsparse.parallel.partition import is_partitioned
from megatron_qsparse.parallel.zero import ZeroEngine

STATES = ("fp32", *MOMENTS)
"""Master weight and moments: fp32, sharded at every stage."""
WEIGHT = "weight"
"""Working precision: whole on every data-parallel rank at stages 1 and 2."""


@dataclass(frozen=True)
class Spread:
    """One parameter over its data-parallel group (for experts the smaller one)."""

    place: Place
    group: dist.ProcessGroup
    spans: tuple[tuple[int, int], ...]
    """(start, length) of each rank's part of the flattened local parameter; length 0 where it has none."""
    writer: int
    """Rank in the group."""

    @property
    def is_writer(self) -> bool:
        return self.group.rank() == self.writer

    @property
    def span(self) -> tuple[int, int]:
        """This rank's."""
        return self.spans[self.group.rank()]

    @property
    def writer_has_all(self) -> bool:
        return self.spans[self.writer][1] == self.place.numel

    def gather(self, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor | None:
        """The whole flat tensor on the writer, None elsewhere. part: this rank's span, in host memory.

        Collective over this parameter's group, by messages in `group`, a gloo group of all ranks.
        """
        if not self.is_writer:
            if self.span[1]:
                dist.send(part, self._global_rank(self.writer), group=group)
            return None
        whole = torch.empty(self.place.numel, dtype=part.dtype)
        receiving = []
        for rank, (start, length) in enumerate(self.spans):
            if rank == self.writer:
                whole.narrow(0, start, length).copy_(part)
            elif length:
                receiving.append(dist.irecv(whole.narrow(0, start, length), self._global_rank(rank), group=group))
        for request in receiving:
            request.wait()
        return whole

    def scatter(self, whole: torch.Tensor | None, part: torch.Tensor) -> None:
        """The inverse of `gather`: fill `part` on every rank from the writer's flat tensor. Collective over the group."""
        messages = []
        if not self.is_writer:
            if self.span[1]:
                messages.append(dist.P2POp(dist.irecv, part, self._global_rank(self.writer), self.group))
        else:
            whole = whole.to(part.device)
            for rank, (start, length) in enumerate(self.spans):
                if rank == self.writer:
                    part.copy_(whole.narrow(0, start, length))
                elif length:
                    messages.append(dist.P2POp(dist.isend, whole.narrow(0, start, length), self._global_rank(rank), self.group))
        # As one batch: single messages would make NCCL keep a communicator for every pair of ranks.
        for request in dist.batch_isend_irecv(messages) if messages else ():
            request.wait()

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Make `tensor` the writer's on every rank of the group."""
        if self.group.size() > 1:
            dist.broadcast(tensor, self._global_rank(self.writer), group=self.group)

    def _global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.group, rank)


def spreads(engine: ZeroEngine, places: list[Place]) -> list[Spread]:
    """Of all parameters among the places, in their order. Collective over the data-parallel groups."""
    parameters = [place for place in places if place.is_parameter]
    groups = [_group(place.tensor) for place in parameters]
    spans: list[list[tuple[int, int]]] = [[] for _ in parameters]
    for group in dict.fromkeys(groups):
        members = [i for i, other in enumerate(groups) if other is group]
        here = [_own_span(engine, parameters[i]) for i in members]
        ranks = [None] * group.size()
        dist.all_gather_object(ranks, here, group=group)
        for position, i in enumerate(members):
            spans[i] = [rank[position] for rank in ranks]
    written: dict[dist.ProcessGroup, list[int]] = {group: [0] * group.size() for group in groups}
    found = []
    for place, group, parts in zip(parameters, groups, spans, strict=True):
        # The rank that holds most of it; among equals the one that writes least so far.
        load = written[group]
        writer = max(range(group.size()), key=lambda rank: (parts[rank][1], -load[rank], -rank))
        load[writer] += place.numel
        found.append(Spread(place, group, tuple(parts), writer))
    return found


def _group(param: torch.Tensor) -> dist.ProcessGroup:
    return param.ds_process_group if is_partitioned(param) else param._dp_group


def _own_span(engine: ZeroEngine, place: Place) -> tuple[int, int]:
    if engine.stage == 3:
        share = place.tensor.ds_tensor.numel()
        start = share * place.tensor.ds_zero_partition_rank
        # The last shares are padded, or nothing but padding.
        return start, max(0, min(share, place.numel - start))
    mapping = place.tensor._hp_mapping
    return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)


def part_of(engine: ZeroEngine, spread: Spread, kind: str) -> torch.Tensor:
    """This rank's span of one of `STATES`, or of the weight at stage 3: flat, a view of ZeRO's memory, to read and to write."""
    param, length = spread.place.tensor, spread.span[1]
    if kind == WEIGHT:
        return param.ds_tensor.data.narrow(0, 0, length)
    if engine.stage == 3:
        utils = deepspeed.load().utils
        local = utils.safe_get_local_fp32_param(param) if kind == "fp32" else utils.safe_get_local_optimizer_state(param, kind)
        return local.data.narrow(0, 0, length)
    if not length:
        return torch.empty(0, dtype=torch.float32, device=param.device)
    return param._hp_mapping.get_hp_fragment(None if kind == "fp32" else kind).data
