"""Memory of a rank against counts done by hand."""

import pytest

from megatron_qsparse.config import BitNetConfig, QSparseConfig, RecipeRule
from megatron_qsparse.models.accounting import parameters
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.memory import Layout, checkpoint_bytes, memory_per_rank
from megatron_qsparse.models.presets import apply_preset
from tests.models.shapes import DENSE, DOWN, EXPERT, GATE_UP, LINEAR, MISTRAL, MIXTURE, PROJ, QKV, ROUTER, SMALL


def test_memory_of_one_rank_by_hand():
    memory = memory_per_rank(SMALL, Layout(), *DENSE, precision="bf16", micro_batch_size=2, sequence_length=5)
    total = parameters(SMALL).total
    assert (memory.weights, memory.gradients, memory.optimizer, memory.codes) == (2 * total, (4 + 2) * total, 12 * total, 0)
    # Per token and layer: 2 norm inputs, qkv and gate_up inputs, q k v and log-sum-exp, attention output, five GLU tensors.
    layer = 2 * 8 * 2 + 2 * 8 * 2 + 16 * 2 + 4 * 4 + 8 * 2 + 5 * 12 * 2
    assert memory.activations == 10 * (3 * layer + 10 * (2 + 4))
    assert memory.total == 20 * total + memory.activations


def test_memory_is_sharded_by_data_parallelism():
    def of(stage):
        return memory_per_rank(SMALL, Layout(data=4, zero_stage=stage), *DENSE, "bf16", 1, 5)

    total = parameters(SMALL).total
    assert (of(1).weights, of(1).gradients, of(1).optimizer) == (2 * total, 6 * total, 12 * total / 4)
    assert (of(2).weights, of(2).gradients, of(2).optimizer) == (2 * total, 4 * total / 4, 12 * total / 4)
    assert (of(3).weights, of(3).gradients, of(3).optimizer) == (2 * total / 4, 4 * total / 4, 12 * total / 4)
    assert of(1).gathered == of(2).gathered == 0


def test_zero_3_keeps_no_codes_and_gathers_a_bounded_part_of_the_weights():
    layout, bitnet = Layout(data=4, zero_stage=3), BitNetConfig(enabled=True)
    small = memory_per_rank(SMALL, layout, QSparseConfig(), bitnet, "bf16", 1, 5)
    assert small.codes == 0 and small.gathered == 2 * parameters(SMALL).total
    assert small.total == small.weights + small.gradients + small.optimizer + small.gathered + small.activations
    assert memory_per_rank(MISTRAL, layout, *DENSE, "bf16", 1, 5).gathered == 2e9


def test_memory_is_sharded_by_tensor_parallelism():
    bitnet = BitNetConfig(enabled=True, subln=True)
    memory = memory_per_rank(SMALL, Layout(tensor=2), QSparseConfig(), bitnet, "fp32", 1, 5)
    norms, subln, tables = 7 * 8, 3 * 20, 160
    assert memory.weights == 4 * ((LINEAR + tables + subln) / 2 + norms)
    assert memory.codes == LINEAR / 2


def test_memory_takes_the_fullest_stage():
    """Stage 0 of 3 keeps three micro-batches; the last one keeps one, but the logits, which outweigh them for a large vocabulary."""
    layout = Layout(pipeline=3)
    layer = LINEAR / 3 + 2 * 8
    first = memory_per_rank(SMALL, layout, *DENSE, "bf16", 4, 64)
    assert first.weights == 2 * (layer + 80)
    wide = apply_preset(
        ModelConfig(num_layers=3, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=10_000), None
    )
    last = memory_per_rank(wide, layout, *DENSE, "bf16", 4, 64)
    assert last.weights == 2 * (layer + 80_000 + 8)


def test_interleaving_keeps_more_activations_of_the_same_weights():
    """Two stages of two chunks: stage 0 has layers 0 and 2, and 2 + 2 + 1 chunks in flight where 2 micro-batches were 4."""
    model = apply_preset(
        ModelConfig(num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2, vocab_size=10), None
    )
    plain = memory_per_rank(model, Layout(pipeline=2), *DENSE, "bf16", 4, 64)
    interleaved = memory_per_rank(model, Layout(pipeline=2, virtual_pipeline=2), *DENSE, "bf16", 4, 64)
    assert interleaved.weights == plain.weights and interleaved.activations == plain.activations * 5 / 4
    bitnet, qsparse = BitNetConfig(enabled=True), QSparseConfig(recipe=[RecipeRule(match="layers.[13].*", bitnet=False)])
    layer = QKV + PROJ + GATE_UP + DOWN
    assert memory_per_rank(model, Layout(pipeline=2), qsparse, bitnet, "bf16", 4, 64).codes == layer
    assert memory_per_rank(model, Layout(pipeline=2, virtual_pipeline=2), qsparse, bitnet, "bf16", 4, 64).codes == 2 * layer


def test_recipes_decide_where_codes_are_kept():
    bitnet = BitNetConfig(enabled=True)
    qsparse = QSparseConfig(recipe=[RecipeRule(match="layers.0.*", bitnet=False)])
    assert memory_per_rank(SMALL, Layout(), qsparse, bitnet, "bf16", 1, 5).codes == LINEAR * 2 / 3
    whole = memory_per_rank(SMALL, Layout(), QSparseConfig(), bitnet, "bf16", 1, 5)
    dense = memory_per_rank(SMALL, Layout(), *DENSE, "bf16", 1, 5)
    # One byte instead of two for four inputs of 8, 8, 8 and 12 features; the attention output is kept besides its codes.
    assert dense.activations - whole.activations == 5 * 3 * (8 + 8 + 12 - 8)


def test_checkpoint_holds_weights_master_and_moments():
    assert checkpoint_bytes(SMALL, "bf16") == 14 * parameters(SMALL).total
    assert checkpoint_bytes(SMALL, "bf16", weights_only=True) == 2 * parameters(SMALL).total
    assert checkpoint_bytes(SMALL, "fp32", subln=True) == 16 * parameters(SMALL, subln=True).total


def test_memory_of_experts_is_sharded_over_their_ranks():
    def of(**layout):
        return memory_per_rank(MIXTURE, Layout(**layout), QSparseConfig(), BitNetConfig(enabled=True, subln=True), "bf16", 1, 5)

    experts = 3 * 4 * (sum(EXPERT) + 6)
    rest = parameters(MIXTURE, subln=True).total - experts
    one, four = of(), of(data=4, expert=2, zero_stage=2)
    assert (one.weights, one.gradients, one.optimizer) == (2 * (rest + experts), 6 * (rest + experts), 12 * (rest + experts))
    assert four.weights == 2 * (rest + experts / 2)
    # Two ranks hold the same experts and share their optimizer states.
    assert four.optimizer == 12 * (rest / 4 + experts / 2 / 2) and four.gradients == four.optimizer / 3
    assert one.codes - four.codes == 3 * 4 * sum(EXPERT) / 2
    tensor, embedding, norms, router = of(tensor=2, sequence=True), 160, 7 * 8, 3 * ROUTER
    sharded = one.weights / 2 - norms - router
    assert tensor.weights == 2 * (sharded / 2 + norms + router) and embedding < sharded


def test_activations_of_experts_by_hand():
    memory = memory_per_rank(MIXTURE, Layout(), *DENSE, precision="bf16", micro_batch_size=2, sequence_length=5)
    # As for a dense model, but two experts of 6, with what the probability multiplies, and the shared one of 10, each with its input;
    # the router's input and 3 x 4 in fp32.
    layer = 2 * 8 * 2 + 8 * 2 + 16 * 2 + 4 * 4 + 8 * 2 + 2 * (8 * 2 + 6 * 6 * 2) + (8 * 2 + 5 * 10 * 2) + 8 * 2 + 3 * 4 * 4
    assert memory.activations == 10 * (3 * layer + 10 * (2 + 4))


def test_recomputation_keeps_inputs_and_one_layer():
    bf16, tokens = 2, 10
    whole = memory_per_rank(SMALL, Layout(), *DENSE, "bf16", 2, 5).activations
    logits = tokens * 10 * (bf16 + 4)
    recomputed = memory_per_rank(SMALL, Layout(recompute=True), *DENSE, "bf16", 2, 5).activations
    assert recomputed == 3 * tokens * 8 * bf16 + (whole - logits) / 3 + logits


def test_no_more_micro_batches_are_kept_than_there_are():
    def of(micro_batches):
        return memory_per_rank(SMALL, Layout(pipeline=3, micro_batches=micro_batches), *DENSE, "bf16", 4, 64).activations

    assert of(2) * 3 / 2 == of(3) == of(None)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: memory_per_rank(SMALL, Layout(pipeline=2), *DENSE, "bf16", 1, 5), "num_layers=3.*parallel.pipeline=2"),
        (lambda: memory_per_rank(SMALL, Layout(zero_stage=0), *DENSE, "bf16", 1, 5), "zero.stage=0"),
    ],
)
def test_layouts_that_do_not_exist_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
