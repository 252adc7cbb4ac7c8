"""Every mask and every activation code of a training step, put together from all ranks."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tests.parallel.helpers import reports


@dataclass
class Choices:
    """What one projection chose in one step: a mask or int8 codes; whole, in the order of the global batch.

    All tensors are [samples, sequence, 1, width]; those of an expert [1, tokens routed to it, width], in the order of its rank.
    """

    inputs: torch.Tensor
    chosen: torch.Tensor
    """bool for a mask, int8 for codes."""
    scale: torch.Tensor | None
    """Of codes, fp32 [..., 1]."""
    groups: int
    """Equal slices of the width in which a mask chooses."""

    @property
    def of_expert(self) -> bool:
        return self.inputs.dim() == 3


def projection_name(module) -> str:
    return module.settings.name + ("" if module.expert is None else f".expert{module.expert}")


@dataclass
class Recorder:
    """The local pieces of this rank, one tuple of tensors per micro-batch."""

    pieces: dict[tuple[str, str], list[tuple[torch.Tensor, ...]]] = field(default_factory=dict)
    places: dict[tuple[str, str], tuple[int | None, int]] = field(default_factory=dict)
    """(dimension along which the tensor-parallel ranks' pieces are joined, or None where they are copies; groups)"""

    def add(self, kind: str, module, *tensors: torch.Tensor) -> None:
        # A layer that is recomputed runs twice; the first time without gradients.
        if not torch.is_grad_enabled():
            return
        key = kind, projection_name(module)
        split = -1 if module.input_is_sharded else (1 if module.config.sequence_parallel and module.expert is None else None)
        self.places[key] = (split if module.tp_group.size() > 1 else None, module.settings.groups)
        self.pieces.setdefault(key, []).append(tuple(tensor.detach().clone() for tensor in tensors))

    def joined(self, differing: list[str]) -> dict[tuple[str, str], Choices]:
        """By (kind, projection) in the order of the forward; collective, the result is on rank 0 and empty elsewhere.

        Names of pieces that should be copies of each other and are not are appended to `differing`.
        """
        from megatron.core import parallel_state

        stacked = {key: tuple(_stack(parts) for parts in zip(*pieces, strict=True)) for key, pieces in self.pieces.items()}
        mine = (parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank(), stacked, self.places)
        # Ranks are ordered by tensor-, then data-, then pipeline-parallel rank: later stages append later layers.
        found: dict[tuple[str, str], dict[int, list]] = {}
        places = {}
        for data, _, pieces, theirs in reports(mine, everywhere=False):
            places |= theirs
            for key, tensors in pieces.items():
                found.setdefault(key, {}).setdefault(data, []).append(tensors)
        return {key: _join(key, [by_data[data] for data in sorted(by_data)], *places[key], differing) for key, by_data in found.items()}


def _stack(parts: list[torch.Tensor]) -> torch.Tensor:
    """Micro-batches [sequence, samples, width] become samples; the tokens [tokens, width] of an expert one long list."""
    return torch.cat(parts, dim=1).transpose(0, 1)[:, :, None] if parts[0].dim() == 3 else torch.cat(parts)[None]


def _join(key: tuple[str, str], by_data: list[list[tuple]], split: int | None, groups: int, differing: list[str]) -> Choices:
    """One projection's tensors from (data-parallel rank, tensor-parallel rank)."""
    samples = []
    for shards in by_data:
        inputs, chosen, *scale = (_join_shards(key, list(parts), split, differing) for parts in zip(*shards, strict=True))
        samples.append((inputs, chosen, *scale))
    of_expert = samples[0][0].dim() == 3
    inputs, chosen, *scale = (torch.cat(parts, dim=1 if of_expert else 0) for parts in zip(*samples, strict=True))
    return Choices(inputs, chosen, scale[0] if scale else None, groups)


def _join_shards(key: tuple[str, str], shards: list[torch.Tensor], split: int | None, differing: list[str]) -> torch.Tensor:
    # The scale of a sharded token is one number on all its ranks.
    replicated = split is None or (split == -1 and shards[0].shape[-1] == 1)
    if not replicated:
        return torch.cat(shards, dim=split)
    if not all(torch.equal(shards[0], shard) for shard in shards):
        differing.append(" ".join(key))
    return shards[0]


@contextlib.contextmanager
def recording(model) -> Iterator[Recorder]:
    """Record the masks and codes of all projections of this rank."""
    from megatron_qsparse.layers import linear

    recorder, original, current = Recorder(), linear.int8_absmax, []
    modules = [module for module in model.modules() if hasattr(module, "settings")]

    def watch(module):
        mask, multiply = module.mask, module._multiply_codes

        def recorded_mask(x):
            chosen = mask(x)
            recorder.add("mask", module, x, chosen)
            return chosen

        def recorded_multiply(*args):
            current.append(module)
            return multiply(*args)

        module.mask, module._multiply_codes = recorded_mask, recorded_multiply

    def recorded_absmax(x, reduce_max=None):
        codes, scale = original(x, reduce_max)
        recorder.add("codes", current.pop(), x, codes, scale)
        return codes, scale

    for module in modules:
        watch(module)
    linear.int8_absmax = recorded_absmax
    try:
        yield recorder
    finally:
        linear.int8_absmax = original
        for module in modules:
            del module.mask, module._multiply_codes
