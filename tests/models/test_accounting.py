"""Accounting against the paper's table and against counts done by hand."""

import pytest

from megatron_qsparse.config import PROJECTIONS, BitNetConfig, QSparseConfig, RecipeRule
from megatron_qsparse.models import accounting
from megatron_qsparse.models.accounting import Layout
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.presets import apply_preset

MISTRAL = apply_preset(
    ModelConfig(
        preset="7b", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        activation="silu_glu", vocab_size=32000,
    ),
    None,
)  # fmt: skip
# hidden 8, 4 heads of 2 features, 2 key/value heads, GLU width 12, 3 layers, vocabulary 10.
SMALL = apply_preset(
    ModelConfig(num_layers=3, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=10), None
)
QKV, PROJ, GATE_UP, DOWN = (8 + 2 * 4) * 8, 8 * 8, 24 * 8, 8 * 12
LINEAR = 3 * (QKV + PROJ + GATE_UP + DOWN)
DENSE = (QSparseConfig(), BitNetConfig())


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


def test_memory_of_one_rank_by_hand():
    memory = accounting.memory_per_rank(SMALL, Layout(), *DENSE, precision="bf16", micro_batch_size=2, sequence_length=5)
    total = accounting.parameters(SMALL).total
    assert (memory.weights, memory.gradients, memory.optimizer, memory.codes) == (2 * total, 4 * total, 12 * total, 0)
    # Per token and layer: 2 norm inputs, qkv and gate_up inputs, q k v and log-sum-exp, attention output, five GLU tensors.
    layer = 2 * 8 * 2 + 2 * 8 * 2 + 16 * 2 + 4 * 4 + 8 * 2 + 5 * 12 * 2
    assert memory.activations == 10 * (3 * layer + 10 * (2 + 4))
    assert memory.total == 18 * total + memory.activations


def test_memory_is_sharded_by_data_parallelism():
    def of(stage):
        return accounting.memory_per_rank(SMALL, Layout(data=4, zero_stage=stage), *DENSE, "bf16", 1, 5)

    total = accounting.parameters(SMALL).total
    assert (of(1).weights, of(1).gradients, of(1).optimizer) == (2 * total, 4 * total, 12 * total / 4)
    assert (of(2).weights, of(2).gradients, of(2).optimizer) == (2 * total, 4 * total / 4, 12 * total / 4)
    assert (of(3).weights, of(3).gradients, of(3).optimizer) == (2 * total / 4, 4 * total / 4, 12 * total / 4)
    assert of(1).gathered == of(2).gathered == 0


def test_zero_3_keeps_no_codes_and_gathers_a_bounded_part_of_the_weights():
    layout, bitnet = Layout(data=4, zero_stage=3), BitNetConfig(enabled=True)
    small = accounting.memory_per_rank(SMALL, layout, QSparseConfig(), bitnet, "bf16", 1, 5)
    assert small.codes == 0 and small.gathered == 2 * accounting.parameters(SMALL).total
    assert small.total == small.weights + small.gradients + small.optimizer + small.gathered + small.activations
    assert accounting.memory_per_rank(MISTRAL, layout, *DENSE, "bf16", 1, 5).gathered == 2e9


def test_memory_is_sharded_by_tensor_parallelism():
    bitnet = BitNetConfig(enabled=True, subln=True)
    memory = accounting.memory_per_rank(SMALL, Layout(tensor=2), QSparseConfig(), bitnet, "fp32", 1, 5)
    norms, subln, tables = 7 * 8, 3 * 20, 160
    assert memory.weights == 4 * ((LINEAR + tables + subln) / 2 + norms)
    assert memory.codes == LINEAR / 2


def test_memory_takes_the_fullest_stage():
    """Stage 0 of 3 keeps three micro-batches; the last one keeps one, but the logits, which outweigh them for a large vocabulary."""
    layout = Layout(pipeline=3)
    layer = LINEAR / 3 + 2 * 8
    first = accounting.memory_per_rank(SMALL, layout, *DENSE, "bf16", 4, 64)
    assert first.weights == 2 * (layer + 80)
    wide = apply_preset(
        ModelConfig(num_layers=3, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=10_000), None
    )
    last = accounting.memory_per_rank(wide, layout, *DENSE, "bf16", 4, 64)
    assert last.weights == 2 * (layer + 80_000 + 8)


def test_interleaving_keeps_more_activations_of_the_same_weights():
    """Two stages of two chunks: stage 0 has layers 0 and 2, and 2 + 2 + 1 chunks in flight where 2 micro-batches were 4."""
    model = apply_preset(
        ModelConfig(num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=10), None
    )
    plain = accounting.memory_per_rank(model, Layout(pipeline=2), *DENSE, "bf16", 4, 64)
    interleaved = accounting.memory_per_rank(model, Layout(pipeline=2, virtual_pipeline=2), *DENSE, "bf16", 4, 64)
    assert interleaved.weights == plain.weights and interleaved.activations == plain.activations * 5 / 4
    bitnet, qsparse = BitNetConfig(enabled=True), QSparseConfig(recipe=[RecipeRule(match="layers.[13].*", bitnet=False)])
    layer = QKV + PROJ + GATE_UP + DOWN
    assert accounting.memory_per_rank(model, Layout(pipeline=2), qsparse, bitnet, "bf16", 4, 64).codes == layer
    assert accounting.memory_per_rank(model, Layout(pipeline=2, virtual_pipeline=2), qsparse, bitnet, "bf16", 4, 64).codes == 2 * layer


def test_recipes_decide_where_codes_are_kept():
    bitnet = BitNetConfig(enabled=True)
    qsparse = QSparseConfig(recipe=[RecipeRule(match="layers.0.*", bitnet=False)])
    assert accounting.memory_per_rank(SMALL, Layout(), qsparse, bitnet, "bf16", 1, 5).codes == LINEAR * 2 / 3
    whole = accounting.memory_per_rank(SMALL, Layout(), QSparseConfig(), bitnet, "bf16", 1, 5)
    dense = accounting.memory_per_rank(SMALL, Layout(), *DENSE, "bf16", 1, 5)
    # One byte instead of two for four inputs of 8, 8, 8 and 12 features; the attention output is kept besides its codes.
    assert dense.activations - whole.activations == 5 * 3 * (8 + 8 + 12 - 8)


def test_checkpoint_holds_weights_master_and_moments():
    assert accounting.checkpoint_bytes(SMALL, "bf16") == 14 * accounting.parameters(SMALL).total
    assert accounting.checkpoint_bytes(SMALL, "bf16", weights_only=True) == 2 * accounting.parameters(SMALL).total
    assert accounting.checkpoint_bytes(SMALL, "fp32", subln=True) == 16 * accounting.parameters(SMALL, subln=True).total


# As SMALL, but 4 experts of width 6, two for a token, and a shared one of 10.
MIXTURE = apply_preset(
    ModelConfig(
        num_layers=3, hidden_size=8, num_attention_heads=4, num_query_groups=2, vocab_size=10,
        num_experts=4, moe_ffn_hidden_size=6, moe_shared_expert_ffn_hidden_size=10,
    ),
    None,
)  # fmt: skip
EXPERT, SHARED, ROUTER = (12 * 8, 8 * 6), (20 * 8, 8 * 10), 4 * 8


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


def test_memory_of_experts_is_sharded_over_their_ranks():
    def of(**layout):
        return accounting.memory_per_rank(MIXTURE, Layout(**layout), QSparseConfig(), BitNetConfig(enabled=True, subln=True), "bf16", 1, 5)

    experts = 3 * 4 * (sum(EXPERT) + 6)
    rest = accounting.parameters(MIXTURE, subln=True).total - experts
    one, four = of(), of(data=4, expert=2, zero_stage=2)
    assert (one.weights, one.gradients, one.optimizer) == (2 * (rest + experts), 4 * (rest + experts), 12 * (rest + experts))
    assert four.weights == 2 * (rest + experts / 2)
    # Two ranks hold the same experts and share their optimizer states.
    assert four.optimizer == 12 * (rest / 4 + experts / 2 / 2) and four.gradients == four.optimizer / 3
    assert one.codes - four.codes == 3 * 4 * sum(EXPERT) / 2
    tensor, embedding, norms, router = of(tensor=2, sequence=True), 160, 7 * 8, 3 * ROUTER
    sharded = one.weights / 2 - norms - router
    assert tensor.weights == 2 * (sharded / 2 + norms + router) and embedding < sharded


def test_activations_of_experts_by_hand():
    memory = accounting.memory_per_rank(MIXTURE, Layout(), *DENSE, precision="bf16", micro_batch_size=2, sequence_length=5)
    # As for a dense model, but two experts of 6 and the shared one of 10, each with its input; the router's input and 3 x 4 in fp32.
    layer = 2 * 8 * 2 + 8 * 2 + 16 * 2 + 4 * 4 + 8 * 2 + 2 * (8 * 2 + 5 * 6 * 2) + (8 * 2 + 5 * 10 * 2) + 8 * 2 + 3 * 4 * 4
    assert memory.activations == 10 * (3 * layer + 10 * (2 + 4))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: accounting.parameters(ModelConfig(num_layers=2)), "model.hidden_size is not set.*apply_preset"),
        (lambda: accounting.memory_per_rank(SMALL, Layout(pipeline=2), *DENSE, "bf16", 1, 5), "num_layers=3.*parallel.pipeline=2"),
        (lambda: accounting.memory_per_rank(SMALL, Layout(zero_stage=0), *DENSE, "bf16", 1, 5), "zero.stage=0"),
    ],
)
def test_what_cannot_be_counted_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
