"""Ternary codes of a model: which rows share an alpha, when codes are made, and that stale ones are found."""

from types import SimpleNamespace

import pytest
import torch

from megatron_qsparse.config import ParallelConfig
from megatron_qsparse.layers.ternary import TernaryWeights, logical_rows
from tests.parallel.helpers import SEQUENCE, build, load, tokens
from tests.parallel.teacher import whole_weights


def _rows_by_hand(heads: int, kv_heads: int, head_dim: int) -> list[int]:
    """0, 1, 2 for q, k, v of every row of Megatron's whole qkv weight: per group its queries, its key, its value."""
    labels = []
    for _ in range(kv_heads):
        for matrix, count in ((0, heads // kv_heads), (1, 1), (2, 1)):
            labels += [matrix] * count * head_dim
    return labels


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2), (8, 1), (16, 2)])
def test_rows_of_qkv_are_labelled_by_their_global_place(heads, kv_heads, ranks):
    """Also where a rank's share begins or ends within a head group, as with fewer key/value heads than ranks."""
    head_dim, inputs = 4, 6
    expected = _rows_by_hand(heads, kv_heads, head_dim)
    config = SimpleNamespace(num_attention_heads=heads, num_query_groups=kv_heads, kv_channels=head_dim)
    found = []
    for rank in range(ranks):
        layer = SimpleNamespace(
            weight=torch.empty(len(expected) // ranks, inputs), config=config, output_size=len(expected), input_size=inputs,
            tp_group=SimpleNamespace(rank=lambda rank=rank: rank),
        )  # fmt: skip
        labels, entries = logical_rows(layer, "attention.qkv")
        found += labels.tolist()
        assert entries == [expected.count(matrix) * inputs for matrix in range(3)]
    assert found == expected


def test_rows_of_gate_up_are_the_local_halves_and_other_projections_are_one_matrix():
    layer = SimpleNamespace(weight=torch.empty(10, 3), output_size=40, input_size=3)
    labels, entries = logical_rows(layer, "mlp.gate_up")
    assert labels.tolist() == [0] * 5 + [1] * 5 and entries == [60, 60]
    labels, entries = logical_rows(layer, "mlp.down")
    assert labels.tolist() == [0] * 10 and entries == [120]


def _model(variant: str, dtype=torch.float32):
    model = build(variant, ParallelConfig(), dtype)
    load(model, whole_weights(variant))
    return model, TernaryWeights(model.modules())


def _loss(model, seed: int = 0) -> torch.Tensor:
    batch = tokens(2, seed)
    losses = model(batch[:, :-1].contiguous(), torch.arange(SEQUENCE).expand(2, -1), None, labels=batch[:, 1:].contiguous())
    return losses.float().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("variant", "kv_heads"), [("bitnet", 4), ("two_kv_heads", 2), ("one_kv_head", 1)])
def test_each_logical_matrix_has_three_values_of_its_own_alpha(alone, variant, kv_heads, dtype):
    model, ternary = _model(variant, dtype)
    _loss(model)
    assert len(ternary.weights) == 8
    for weight in ternary.weights:
        projection, rows = weight.layer.settings.projection, weight.codes.shape[0]
        labels = {"attention.qkv": _rows_by_hand(4, kv_heads, 16), "mlp.gate_up": [0] * (rows // 2) + [1] * (rows // 2)}
        labels = torch.tensor(labels.get(projection, [0] * rows))
        operand = weight.codes * weight.alpha[:, None]
        alphas = set()
        for matrix in labels.unique():
            chosen = weight.layer.weight[labels == matrix].detach()
            alpha = chosen.double().abs().mean().item()
            expected = (chosen.double() / alpha).round().clamp(-1, 1)
            assert weight.alpha[labels == matrix].unique().tolist() == [pytest.approx(alpha, rel=1e-6)]
            assert operand[labels == matrix].unique().numel() == 3
            # The quotient lies within fp32 rounding of a half for very few weights.
            assert (weight.codes[labels == matrix] != expected).float().mean() < 1e-3
            alphas.add(weight.alpha[labels == matrix][0].item())
        assert len(alphas) == {"attention.qkv": 3, "mlp.gate_up": 2}.get(projection, 1)
        assert weight.alpha.dtype == torch.float32 and weight.codes.dtype == torch.int8


def test_codes_are_no_part_of_the_state_and_survive_casts(alone):
    model, ternary = _model("bitnet")
    _loss(model)
    names, codes = set(model.state_dict()), ternary.weights[0].codes.clone()
    assert {name.rsplit(".", 1)[1] for name in names} <= {"weight", "_extra_state"}
    model.to(torch.bfloat16)
    assert torch.equal(ternary.weights[0].codes, codes) and ternary.weights[0].alpha.dtype == torch.float32


def test_weights_written_through_data_are_requantized_after_invalidation_only(alone):
    model, ternary = _model("bitnet_groups_subln")
    before = _loss(model)
    version = ternary.weights[0].layer.weight._version
    for weight in ternary.weights:
        weight.layer.weight.data.add_(0.05 * torch.randn(weight.layer.weight.shape, generator=torch.Generator().manual_seed(1)))
    assert ternary.weights[0].layer.weight._version == version, "autograd would notice by itself"
    assert _loss(model) == before, "codes are made anew by invalidate() alone"
    ternary.invalidate()
    after = _loss(model)
    assert after != before
    fresh, other = _model("bitnet_groups_subln")
    for weight, source in zip(other.weights, ternary.weights, strict=True):
        weight.layer.weight.data.copy_(source.layer.weight)
    assert _loss(fresh) == after
    assert ternary.refreshes == 2


@pytest.mark.parametrize("write", [lambda w: w.mul_(1.0001), lambda w: w[0, 0].add_(1e-3), lambda w: w.copy_(w.roll(1, 0) + 1e-4)])
def test_the_check_finds_a_forgotten_invalidation_and_names_the_layer(alone, write):
    model, ternary = _model("bitnet")
    ternary.check()
    _loss(model)
    ternary.check()
    write(ternary.weights[3].layer.weight.data)
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.down: .*stale"):
        ternary.check()
    ternary.invalidate()
    ternary.check()
    _loss(model)
    ternary.check()


def test_micro_batches_share_one_code_buffer_per_linear(alone):
    """All forwards of a step, and those of the next, save the same int8 storages."""
    model, ternary = _model("bitnet_groups_subln")
    shapes = {tuple(weight.layer.weight.shape) for weight in ternary.weights}
    storages: set[int] = set()

    def pack(tensor):
        if tensor.dtype == torch.int8 and tuple(tensor.shape) in shapes:
            storages.add(tensor.untyped_storage().data_ptr())
        return tensor

    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = [_loss(model, seed) for seed in range(3)]
        for loss in losses:
            loss.backward()
        ternary.invalidate()
    assert len(storages) == len(ternary.weights) == 8
    assert ternary.refreshes == 2


def test_a_refresh_between_a_models_forward_and_backward_is_an_error(alone):
    model, ternary = _model("bitnet")
    loss = _loss(model)
    ternary.invalidate()
    ternary.refresh()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_quantized_linear_without_an_owner_says_so(alone):
    model = build("bitnet", ParallelConfig())
    with pytest.raises(RuntimeError, match="TernaryWeights"):
        _loss(model)
