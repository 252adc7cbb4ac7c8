"""One forward and backward of a whole model from given weights, with everything that another layout must reproduce."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from tests.parallel.helpers import SEQUENCE, build, gather, global_names, layout, load, tokens

SAMPLES = 2


@dataclass
class Trace:
    """What one layout computed, whole."""

    loss: float
    gradients: dict[str, torch.Tensor]
    alphas: dict[str, torch.Tensor]
    masks: list[tuple[str, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(projection, input, mask) in the order of the forward."""
    codes: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """(projection, input, codes, scale)"""
    differing: list[str] = field(default_factory=list)
    """Gradients of replicated parameters that are not the same on all ranks."""


@dataclass
class Comparison:
    """How far a layout is from the reference; every count is over the whole model."""

    loss: float
    gradient: float
    """Largest difference of any gradient entry, relative to the largest entry of its matrix."""
    worst: str
    selected: int
    """Entries that went through a mask or a quantizer."""
    flips: int
    """Mask entries and codes that differ."""
    unexplained: int
    """Flips that are no near-ties."""
    alphas_equal: bool
    differing: list[str]
    """See `Trace.differing`."""


def whole_weights(variant: str) -> dict[str, torch.Tensor]:
    """Weights whose logical matrices have clearly different scales, with norm weights that are not all one; needs TP = PP = 1."""
    from megatron_qsparse.config import ParallelConfig

    generator = torch.Generator().manual_seed(7)
    model = build(variant, ParallelConfig(), seed=3)
    config, weights = model.config, {}
    for name, param in global_names(model).items():
        weight = param.detach().clone()
        if weight.dim() == 1:
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
        elif name.endswith("linear_qkv.weight"):
            per_group = config.num_attention_heads // config.num_query_groups + 2
            slot = torch.arange(weight.shape[0]) // config.kv_channels % per_group
            weight *= torch.where(slot == per_group - 2, 2.0, torch.where(slot == per_group - 1, 0.5, 1.0))[:, None]
        elif name.endswith("linear_fc1.weight"):
            weight[weight.shape[0] // 2 :] *= 3
        weights[name] = weight
    return weights


def run(model, batch: torch.Tensor, sequence_parallel_hooks: bool = True) -> Trace:
    """Mean loss of the batch and its gradient; collective over the tensor-parallel ranks."""
    from megatron.core import parallel_state

    from megatron_qsparse.layers.ternary import TernaryWeights
    from megatron_qsparse.parallel.gradients import install_sequence_parallel_hooks

    TernaryWeights(model.modules())
    if model.config.sequence_parallel and sequence_parallel_hooks:
        install_sequence_parallel_hooks(model)
    with _recording(model) as trace:
        positions = torch.arange(SEQUENCE).expand(batch.shape[0], -1)
        losses = model(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())
        losses.float().mean().backward()
    trace.loss = losses.float().mean().item()
    missing = [name for name, param in model.named_parameters() if param.grad is None]
    assert not missing, f"without a gradient: {missing}"
    alone = parallel_state.get_model_parallel_group().size() == 1
    gradients = {name: param.grad for name, param in global_names(model).items()}
    trace.gradients = gradients if alone else gather(model, lambda param: param.grad, trace.differing)
    for module in model.modules():
        if getattr(module, "ternary", None) is not None:
            parts = [None] * dist.get_world_size(module.tp_group)
            dist.all_gather_object(parts, module.ternary.alpha, group=module.tp_group)
            # Rows of one rank may belong to several matrices; as sets they are comparable across layouts.
            trace.alphas[module.settings.name] = torch.cat(parts).unique()
    return trace


@contextlib.contextmanager
def _recording(model) -> Iterator[Trace]:
    """Record masks and codes of every projection, put together over the tensor-parallel ranks."""
    from megatron_qsparse.layers import linear

    trace, original, current = Trace(0.0, {}, {}), linear.int8_absmax, []

    def joined(module, tensor):
        if module.tp_group.size() == 1 or (not module.input_is_sharded and not module.config.sequence_parallel):
            return tensor.detach().clone()
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(module.tp_group.size())]
        dist.all_gather(parts, tensor.detach().contiguous(), group=module.tp_group)
        return torch.cat(parts, dim=-1 if module.input_is_sharded else 0)

    def watch(module):
        mask, multiply = module.mask, module._multiply_codes

        def recorded_mask(x):
            chosen = mask(x)
            trace.masks.append((module.settings.name, joined(module, x), joined(module, chosen)))
            return chosen

        def recorded_multiply(*args):
            current.append(module)
            return multiply(*args)

        module.mask, module._multiply_codes = recorded_mask, recorded_multiply

    def recorded_absmax(x, reduce_max=None):
        module = current.pop()
        codes, scale = original(x, reduce_max)
        whole_scale = scale if module.input_is_sharded else joined(module, scale)
        trace.codes.append((module.settings.name, joined(module, x), joined(module, codes), whole_scale.detach().clone()))
        return codes, scale

    for module in model.modules():
        if hasattr(module, "settings"):
            watch(module)
    linear.int8_absmax = recorded_absmax
    try:
        yield trace
    finally:
        linear.int8_absmax = original


def compare(reference: Trace, other: Trace) -> Comparison:
    """other against the reference."""
    differences = {
        name: ((grad - reference.gradients[name]).abs().max() / reference.gradients[name].abs().max()).item()
        for name, grad in other.gradients.items()
    }
    worst = max(differences, key=differences.get)
    selected = flips = unexplained = 0
    for (name, x, mask), (other_name, _, other_mask) in zip(reference.masks, other.masks, strict=True):
        assert name == other_name and mask.shape == other_mask.shape
        selected += mask.numel()
        flipped = mask != other_mask
        flips += int(flipped.sum())
        # A row that flips swaps a kept and a dropped entry of nearly the same magnitude.
        for row, changed in zip(x.flatten(0, -2), flipped.flatten(0, -2), strict=True):
            if changed.any():
                magnitudes = row[changed].abs()
                unexplained += 0 if magnitudes.max() <= magnitudes.min() * (1 + 1e-4) else int(changed.sum())
    for (name, x, codes, scale), (other_name, _, other_codes, _) in zip(reference.codes, other.codes, strict=True):
        assert name == other_name and codes.shape == other_codes.shape
        selected += codes.numel()
        flipped = codes != other_codes
        flips += int(flipped.sum())
        exact = (x / scale)[flipped]
        tie = ((exact - exact.floor() - 0.5).abs() < 1e-3) & ((codes - other_codes)[flipped].abs() == 1)
        unexplained += int((~tie).sum())
    equal = all(torch.equal(alpha, other.alphas[name]) for name, alpha in reference.alphas.items())
    return Comparison(abs(other.loss - reference.loss), differences[worst], worst, selected, flips, unexplained, equal, other.differing)


def references(variants: Iterable[str], seed: int) -> dict[str, tuple[dict[str, torch.Tensor], Trace]]:
    """Per variant: the weights, and the trace of a batch without tensor parallelism. Every rank computes them all."""
    found = {}
    with layout() as parallel:
        for variant in variants:
            weights, model = whole_weights(variant), build(variant, parallel)
            load(model, weights)
            found[variant] = (weights, run(model, tokens(SAMPLES, seed)))
    return found


def against_reference(variant: str, seed: int, reference, parallel, sequence_parallel_hooks: bool = True) -> Comparison:
    """The same batch in the present layout."""
    weights, expected = reference
    model = build(variant, parallel)
    load(model, weights)
    return compare(expected, run(model, tokens(SAMPLES, seed), sequence_parallel_hooks))
