"""Accounting against the paper's table and against counts done by hand."""

import pytest

from megatron_qsparse.config import PROJECTIONS, QSparseConfig, RecipeRule
from megatron_qsparse.models import accounting
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.presets import apply_preset
from tests.models.shapes import DOWN, EXPERT, GATE_UP, LINEAR, MISTRAL, MIXTURE, PROJ, QKV, ROUTER, SHARED, SMALL


@pytest.mark.parametrize(
    ("zeros_percent", "activated", "overall"),
    [
        # arXiv 2407.10969, Table 2 (continue-trained Mistral-7B): zeros of QKV, Out, Up = Gate, Down; activated; overall.
        ((0.0, 0.0, 0.0, 0.0), "6.98", "0.0"),
        ((12.3, 0.0, 10.3, 79.3), "5.00", "28.3"),
        ((51.4, 50.0, 50.0, 80.0), "2.91", "58.2"),
        ((42.0, 40.0, 40.0, 60.4), "3.79", "45.7"),
    ],
    ids=["dense", "ReLUfication", "Q-Sparse 2.9B", "Q-Sparse 3.8B"],
)
def test_activated_parameters_reproduce_the_papers_table(zeros_percent, activated, overall):
    sparsity = {name: percent / 100 for name, percent in zip(PROJECTIONS, zeros_percent, strict=True)}
    result = accounting.activated_parameters(MISTRAL, sparsity)
    assert f"{result.total / 1e9:.2f}" == activated
    assert f"{100 * result.sparsity:.1f}" == overall


def test_parameters_of_mistral():
    count = accounting.parameters(MISTRAL)
    # 7,241,732,096 is the size of the published checkpoint.
    assert count.total == 7_241_732_096
    assert f"{count.linear / 1e9:.2f}" == "6.98"


def test_parameters_by_hand():
    count = accounting.parameters(SMALL)
    assert count.projections == {"attention.qkv": 3 * QKV, "attention.proj": 3 * PROJ, "mlp.gate_up": 3 * GATE_UP, "mlp.down": 3 * DOWN}
    assert (count.embedding, count.head, count.norms, count.subln) == (80, 80, 7 * 8, 0)
    assert count.total == LINEAR + 160 + 56
    assert accounting.parameters(SMALL, subln=True).subln == 3 * (8 + 12)
    tied = apply_preset(ModelConfig(tied_embeddings=True), 128)
    assert accounting.parameters(tied).head == 0


def test_shapes_and_widths_name_every_projection():
    assert accounting.projection_shapes(SMALL) == {
        "attention.qkv": (16, 8), "attention.proj": (8, 8), "mlp.gate_up": (24, 8), "mlp.down": (8, 12),
    }  # fmt: skip
    assert tuple(accounting.projection_widths(SMALL)) == PROJECTIONS


def test_activated_parameters_count_unnamed_projections_whole():
    result = accounting.activated_parameters(SMALL, {"mlp.down": 0.75})
    assert result.total == LINEAR - 3 * DOWN * 3 // 4
    assert result.sparsity == pytest.approx(3 * DOWN * 0.75 / LINEAR)


@pytest.mark.parametrize("sparsity", [{"mlp.gate": 0.5}, {"mlp.down": 1.2}, {"mlp.down": -0.1}, {"mlp.down": float("nan")}])
def test_activated_parameters_refuse_nonsense(sparsity):
    with pytest.raises(ValueError, match="mlp"):
        accounting.activated_parameters(SMALL, sparsity)


def test_expected_sparsity_per_mode():
    model = apply_preset(ModelConfig(preset="tiny"), 128)
    # 0.4 * 256 rounds to 102; eight slices of 32 keep 13 each, of 88 keep 35.
    grouped = accounting.expected_sparsity(model, QSparseConfig(keep=0.4))
    assert grouped == {
        "attention.qkv": pytest.approx(1 - 102 / 256), "attention.proj": pytest.approx(1 - 8 * 13 / 256),
        "mlp.gate_up": pytest.approx(1 - 102 / 256), "mlp.down": pytest.approx(1 - 8 * 35 / 704),
    }  # fmt: skip
    assert accounting.expected_sparsity(model, QSparseConfig(keep=0.4, mode="global"))["mlp.down"] == pytest.approx(1 - 282 / 704)
    blocks = accounting.expected_sparsity(model, QSparseConfig(keep=0.5, mode="block"))
    assert blocks == dict.fromkeys(PROJECTIONS, 0.5)


def test_expected_sparsity_averages_over_layers():
    model = apply_preset(ModelConfig(preset="tiny"), 128)
    recipe = [RecipeRule(match="layers.0.*", keep=1.0), RecipeRule(match="layers.-1.mlp.*", keep=0.25)]
    sparsity = accounting.expected_sparsity(model, QSparseConfig(keep=0.5, recipe=recipe))
    assert sparsity["attention.qkv"] == pytest.approx(0.5 * 3 / 4)
    assert sparsity["mlp.gate_up"] == pytest.approx((0 + 0.5 + 0.5 + 0.75) / 4)


def test_flops_by_hand():
    length = 5
    flops = accounting.flops_per_token(SMALL, length)
    # Scores and values, each a multiply-add per feature, over the causal half: 1 + 2 + ... + 5 pairs for 5 tokens.
    attention = 3 * 2 * 2 * 8 * (1 + 2 + 3 + 4 + 5) / length
    assert flops.forward == 2 * LINEAR + 2 * 80 + attention
    assert flops.backward == 2 * flops.forward
    assert flops.total == 6 * (LINEAR + 80) + 3 * attention


def test_activated_flops_skip_zeros_in_the_forward_and_the_weight_gradient_only():
    dense = accounting.flops_per_token(SMALL, 5)
    sparse = accounting.activated_flops_per_token(SMALL, 5, {"attention.qkv": 0.5, "mlp.down": 0.25})
    skipped = 2 * 3 * (QKV * 0.5 + DOWN * 0.25)
    assert dense.forward - sparse.forward == skipped
    assert dense.backward - sparse.backward == skipped
    assert accounting.activated_flops_per_token(SMALL, 5, {}) == dense


def test_parameters_of_experts_by_hand():
    count = accounting.parameters(MIXTURE, subln=True)
    assert count.projections == {
        "attention.qkv": 3 * QKV, "attention.proj": 3 * PROJ, "mlp.gate_up": 12 * EXPERT[0], "mlp.down": 12 * EXPERT[1],
        "mlp.shared_gate_up": 3 * SHARED[0], "mlp.shared_down": 3 * SHARED[1],
    }  # fmt: skip
    assert (count.router, count.subln) == (3 * ROUTER, 3 * (8 + 4 * 6 + 10))
    assert count.total == count.linear + 160 + 56 + count.subln + 3 * ROUTER


def test_a_token_passes_the_chosen_experts_the_shared_one_and_the_router():
    passed = 3 * (QKV + PROJ + 2 * sum(EXPERT) + sum(SHARED))
    dense = accounting.activated_parameters(MIXTURE, {})
    assert (dense.linear, dense.total, dense.sparsity) == (passed, passed + 3 * ROUTER, 0)
    sparse = accounting.activated_parameters(MIXTURE, {"mlp.down": 0.5, "mlp.shared_down": 0.25})
    skipped = 3 * (2 * EXPERT[1] * 0.5 + SHARED[1] * 0.25)
    assert sparse.total == passed + 3 * ROUTER - skipped and sparse.sparsity == pytest.approx(skipped / passed)
    flops, attention = accounting.flops_per_token(MIXTURE, 5), 3 * 2 * 2 * 8 * 15 / 5
    assert flops.forward == 2 * (passed + 80 + 3 * ROUTER) + attention and flops.backward == 2 * flops.forward


def test_an_unfilled_model_is_refused():
    with pytest.raises(ValueError, match="model.hidden_size is not set.*apply_preset"):
        accounting.parameters(ModelConfig(num_layers=2))
