"""What a model is built of: recipes, masks, attention, norms, activations, and the measured sparsity."""

import math

import pytest
import torch

from megatron_qsparse.config import BitNetConfig, ParallelConfig, QSparseConfig, RecipeRule
from megatron_qsparse.layers.attention import SDPAttention
from megatron_qsparse.layers.meter import SparsityMeters
from megatron_qsparse.layers.mlp import ACTIVATIONS
from megatron_qsparse.layers.norm import RMSNorm
from megatron_qsparse.layers.ternary import TernaryWeights
from megatron_qsparse.models.gpt import build_model, transformer_config
from megatron_qsparse.ops.counts import keep_count
from tests.parallel.helpers import CPU, SEQUENCE, small_model, tokens

HIDDEN, FFN = 64, 128


def _build(qsparse=None, bitnet=None, dtype=torch.float32, **shape):
    model = build_model(
        small_model(**shape), qsparse or QSparseConfig(), bitnet or BitNetConfig(), ParallelConfig(),
        sequence_length=SEQUENCE, dtype=dtype, seed=0, device=CPU,
    )  # fmt: skip
    TernaryWeights(model.modules())
    return model


def _linears(model) -> dict[str, torch.nn.Module]:
    return {module.settings.name: module for module in model.modules() if hasattr(module, "settings")}


def _forward(model) -> torch.Tensor:
    batch = tokens(2)
    return model(batch[:, :-1].contiguous(), torch.arange(SEQUENCE).expand(2, -1), None, labels=batch[:, 1:].contiguous())


def _inputs(model) -> dict[str, torch.Tensor]:
    """What each projection multiplied in one forward, by hooks on the masks."""
    seen = {}
    for name, linear in _linears(model).items():
        sparsify = linear._sparsify

        def watched(x, name=name, sparsify=sparsify):
            kept = sparsify(x)
            seen[name] = (x.detach(), kept.detach())
            return kept

        linear._sparsify = watched
    with torch.no_grad():
        _forward(model)
    return seen


def test_recipes_reach_the_layer_they_name(alone):
    recipe = [RecipeRule(match="layers.0.*", keep=1.0, bitnet=False), RecipeRule(match="layers.-1.*", keep=1.0),
              RecipeRule(match="*.mlp.down", keep=0.25)]  # fmt: skip
    model = _build(QSparseConfig(keep=0.5, groups=4, recipe=recipe), BitNetConfig(enabled=True), num_layers=4)
    found = {name: (linear.settings.keep, linear.settings.quantized) for name, linear in _linears(model).items()}
    for layer in range(4):
        for projection in ("attention.qkv", "attention.proj", "mlp.gate_up", "mlp.down"):
            keep = 1 if layer in (0, 3) else 0.25 if projection == "mlp.down" else 0.5
            assert found[f"layers.{layer}.{projection}"] == (keep, layer != 0)
    assert len(found) == 16
    assert {linear.ternary is not None for name, linear in _linears(model).items() if name.startswith("layers.0.")} == {False}
    masked = _inputs(model)
    assert {name.split(".")[1] for name in masked} == {"1", "2"}


@pytest.mark.parametrize("mode", ["groups", "block", "global"])
def test_each_projection_keeps_exactly_its_k(alone, mode):
    model = _build(QSparseConfig(keep=0.3, groups=4, block_m=16, mode=mode), activation="silu_glu")
    slices = {"groups": {"proj": 4, "down": 4}, "global": {}, "block": {"qkv": 4, "proj": 4, "gate_up": 4, "down": 8}}[mode]
    masked = _inputs(model)
    assert len(masked) == 8
    for name, (x, kept) in masked.items():
        groups = slices.get(name.rsplit(".", 1)[1], 1)
        k = keep_count(0.3, x.shape[-1] // groups)
        magnitudes, survivors = x.unflatten(-1, (groups, -1)).abs(), kept.unflatten(-1, (groups, -1))
        assert (survivors.count_nonzero(-1) == k).all(), name
        assert torch.equal(survivors.abs().sort(descending=True).values[..., :k], magnitudes.sort(descending=True).values[..., :k])


def test_subln_is_applied_before_the_mask_of_proj_and_down_only(alone):
    model = _build(QSparseConfig(keep=0.5, groups=4), BitNetConfig(subln=True))
    for name, (x, _) in _inputs(model).items():
        rms = x.square().mean(-1).sqrt()
        if name.endswith(("proj", "down")):
            # eps = 1e-5 pulls the rms of small inputs slightly below one; without the norm they are far from it.
            assert (rms <= 1 + 1e-5).all() and (rms > 0.9).all(), name
    weights = [name for name, _ in model.named_parameters() if "sub_norm" in name]
    normed = ("self_attention.linear_proj", "mlp.linear_fc2")
    assert weights == [f"decoder.layers.{layer}.{path}.sub_norm.weight" for layer in range(2) for path in normed]
    assert not [name for name, _ in _build(bitnet=BitNetConfig(enabled=True)).named_parameters() if "sub_norm" in name]
    _forward(model).mean().backward()
    assert all(param.grad is not None and param.grad.any() for param in model.parameters())


def test_embedding_and_head_stay_dense(alone):
    model = _build(QSparseConfig(keep=0.5, groups=4), BitNetConfig(enabled=True, subln=True))
    assert not hasattr(model.output_layer, "settings") and not hasattr(model.embedding.word_embeddings, "settings")


def test_meters_count_what_is_multiplied(alone):
    model = _build(QSparseConfig(keep=0.5, groups=4), BitNetConfig(enabled=True))
    meters, seen = SparsityMeters(model.modules(), CPU), {}
    _forward(model)
    assert all(linear.meter.counts is None for linear in meters.linears), "idle until started"
    meters.start()
    for name, linear in _linears(model).items():
        observe = linear.meter.observe

        def watched(operand, name=name, observe=observe):
            seen.setdefault(name.split(".", 2)[2], []).append(operand)
            observe(operand)

        linear.meter.observe = watched
    _forward(model), _forward(model)
    measured = meters.stop()
    assert set(measured) == set(seen) == {"attention.qkv", "attention.proj", "mlp.gate_up", "mlp.down"}
    for projection, operands in seen.items():
        assert len(operands) == 4 and operands[0].dtype == torch.int8
        zeros = sum((operand == 0).sum().item() for operand in operands) / sum(operand.numel() for operand in operands)
        assert measured[projection] == pytest.approx(zeros, abs=1e-12)
        # Half is dropped; rounding to int8, and relu^2 before down, add zeros.
        assert measured[projection] >= 0.5
    _forward(model)
    assert meters.stop() == measured, "stopped meters count nothing"
    meters.start()
    assert meters.stop() == {}


def _naive_attention(query, key, value):
    """Softmax attention in float64, one head after the other. query: [s, b, heads, d]."""
    length, batch, heads, size = query.shape
    shared = heads // key.shape[2]
    out = torch.zeros(length, batch, heads, size, dtype=torch.float64)
    future = torch.ones(length, length).triu(1).bool()
    for b in range(batch):
        for head in range(heads):
            scores = query[:, b, head] @ key[:, b, head // shared].t() / math.sqrt(size)
            out[:, b, head] = scores.masked_fill(future, -math.inf).softmax(-1) @ value[:, b, head // shared]
    return out.flatten(2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_is_causal_softmax_attention(alone, kv_heads):
    config = transformer_config(small_model(num_query_groups=kv_heads), ParallelConfig(), torch.float64)
    attention = SDPAttention(config, layer_number=1, attn_mask_type=None, attention_type="self")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(9, 3, heads, 16, dtype=torch.float64, generator=generator).requires_grad_() for heads in (4, kv_heads, kv_heads)
    )
    found, expected = attention(query, key, value), _naive_attention(query, key, value)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    grad = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    operands = (query, key, value)
    for ours, naive in zip(torch.autograd.grad(found, operands, grad), torch.autograd.grad(expected, operands, grad), strict=True):
        assert torch.allclose(ours, naive, rtol=1e-11, atol=1e-12)


def test_attention_refuses_a_mask(alone):
    config = transformer_config(small_model(), ParallelConfig(), torch.float32)
    attention = SDPAttention(config, layer_number=1, attn_mask_type=None, attention_type="self")
    x = torch.randn(4, 1, 4, 16)
    with pytest.raises(ValueError, match="causal"):
        attention(x, x, x, attention_mask=torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rms_norm_is_the_formula(alone, dtype):
    norm = RMSNorm(transformer_config(small_model(), ParallelConfig(), dtype), HIDDEN, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, HIDDEN))
    x = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    assert torch.allclose(norm(x).double(), exact, rtol=1e-12 if dtype == torch.float64 else 2**-7, atol=0)
    assert norm.weight.dtype == dtype and norm.weight.sequence_parallel is False


def test_norm_weights_carry_the_mark_of_sequence_parallelism():
    config = transformer_config(small_model(), ParallelConfig(tensor=2, sequence=True), torch.float32)
    assert RMSNorm(config, HIDDEN).weight.sequence_parallel is True


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gated_mlp_is_up_times_activated_gate(alone, activation):
    model = _build(activation=activation)
    mlp, x = model.decoder.layers[0].mlp, torch.randn(SEQUENCE, 2, HIDDEN, generator=torch.Generator().manual_seed(0))
    gate_weight, up_weight = mlp.linear_fc1.weight.double().split(FFN)
    gate, up = x.double() @ gate_weight.t(), x.double() @ up_weight.t()
    activated = gate.clamp(min=0) ** 2 if activation == "relu2_glu" else gate / (1 + (-gate).exp())
    expected = (activated * up) @ mlp.linear_fc2.weight.double().t()
    assert torch.allclose(mlp(x)[0].double(), expected, rtol=1e-4, atol=1e-6)
