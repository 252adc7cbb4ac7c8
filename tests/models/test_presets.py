"""Presets: the paper's shapes, filled into a configuration without touching what the user set."""

import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_qsparse.config import BitNetConfig, QSparseConfig, problems
from megatron_qsparse.models.accounting import activated_parameters, expected_sparsity, parameters, projection_widths
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.presets import PRESETS, apply_preset

PAPER = {
    # Q-Sparse appendix B: hidden, GLU width, heads, layers, learning rate, the two learning rates of BitNet.
    "300m": (1024, 2730, 16, 24, 6e-4, (1.8e-3, 1.5e-3)),
    "700m": (1536, 4096, 24, 24, 2.5e-4, (1.5e-3, 1e-3)),
    "1b3": (2048, 5460, 32, 24, 2e-4, (1.2e-3, 8e-4)),
    "7b": (4096, 11008, 32, 32, 1.5e-4, (1e-3, 6e-4)),
}


@pytest.mark.parametrize("name", PAPER)
def test_shapes_and_learning_rates_are_the_papers(name):
    hidden, ffn, heads, layers, learning_rate, bitnet = PAPER[name]
    preset = PRESETS[name]
    assert (preset.hidden_size, preset.num_attention_heads, preset.num_layers) == (hidden, heads, layers)
    assert preset.ffn_hidden_size == -(-ffn // 256) * 256
    assert (preset.ffn_hidden_size != ffn) == (f"from {ffn} to {preset.ffn_hidden_size}" in preset.description)
    assert (preset.paper.learning_rate, preset.paper.bitnet_learning_rates) == (learning_rate, bitnet)
    assert preset.paper.steps * preset.paper.batch_tokens == pytest.approx(50e9, rel=0.05)


SIZES = {"tiny": 3.2, "300m": 300, "moe_300m_total": 300, "moe_300m_active": 760, "700m": 700, "1b3": 1300, "7b": 6500}


@pytest.mark.parametrize(("name", "millions"), SIZES.items())
def test_sizes_are_near_their_names(name, millions):
    model = apply_preset(ModelConfig(preset=name), 32000)
    assert parameters(model).linear / 1e6 == pytest.approx(millions, rel=0.06)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("groups", [8, 16, 32])
def test_widths_suit_groups_and_blocks(name, groups):
    model = apply_preset(ModelConfig(preset=name), 32000)
    widths = projection_widths(model)
    assert not problems(QSparseConfig(keep=0.4, groups=groups), BitNetConfig(), widths, model.num_layers, 8)
    block = QSparseConfig(keep=0.5, mode="block", block_m=32)
    assert not problems(block, BitNetConfig(), widths, model.num_layers, 2 if name == "tiny" else 8)


def test_mixtures_match_300m_in_total_and_in_activated_parameters():
    dense, total, active = (apply_preset(ModelConfig(preset=name), 32000) for name in ("300m", "moe_300m_total", "moe_300m_active"))
    expected = activated_parameters(dense, {}).total
    assert parameters(dense).linear == expected
    assert parameters(total).linear + parameters(total).router == pytest.approx(expected, rel=0.01)
    assert activated_parameters(active, {}).total == pytest.approx(expected, rel=0.01)
    # The same again at the sparsity of the paper's table.
    sparse = QSparseConfig(keep=0.4)
    masked = [activated_parameters(model, expected_sparsity(model, sparse)).total for model in (dense, active)]
    assert masked[1] == pytest.approx(masked[0], rel=0.01)
    assert total.num_experts == active.num_experts == 8
    assert parameters(active).linear > 2.4 * expected and activated_parameters(total, {}).total < 0.65 * expected


def test_widths_of_experts():
    own = apply_preset(ModelConfig(preset="300m", num_experts=4), 1000)
    assert (own.moe_ffn_hidden_size, own.ffn_hidden_size, own.moe_shared_expert_ffn_hidden_size) == (2816, 2816, 0)
    set_by_user = apply_preset(ModelConfig(num_experts=4, ffn_hidden_size=96, moe_shared_expert_ffn_hidden_size=32), 1000)
    assert (set_by_user.moe_ffn_hidden_size, set_by_user.moe_shared_expert_ffn_hidden_size) == (96, 32)
    preset = apply_preset(ModelConfig(preset="moe_300m_total"), 1000)
    assert (preset.num_experts, preset.moe_ffn_hidden_size, preset.moe_shared_expert_ffn_hidden_size) == (8, 256, 768)
    assert all(apply_preset(model, 1000) == model for model in (own, set_by_user, preset))
    dense = apply_preset(ModelConfig(preset="moe_300m_total", num_experts=0), 1000)
    assert replace(dense, preset="300m") == apply_preset(ModelConfig(preset="300m"), 1000)


def test_what_the_user_set_stays_and_the_input_is_not_changed():
    config = ModelConfig(preset="300m", num_layers=3, num_attention_heads=8, activation="silu_glu")
    untouched = replace(config)
    filled = apply_preset(config, 1000)
    assert config == untouched
    assert (filled.num_layers, filled.num_attention_heads, filled.activation) == (3, 8, "silu_glu")
    assert (filled.hidden_size, filled.ffn_hidden_size, filled.num_query_groups) == (1024, 2816, 8)
    assert apply_preset(filled, 1000) == filled


@pytest.mark.parametrize(("tokenizer", "multiple", "expected"), [(4096, 128, 4096), (4097, 128, 4224), (1, 64, 64), (50257, 1, 50257)])
def test_vocabulary_is_rounded_up(tokenizer, multiple, expected):
    assert apply_preset(ModelConfig(vocab_multiple=multiple), tokenizer).vocab_size == expected


def test_explicit_vocabulary_is_kept():
    assert apply_preset(ModelConfig(vocab_size=4100), 4096).vocab_size == 4100
    assert apply_preset(ModelConfig(vocab_size=4100), None).vocab_size == 4100


@pytest.mark.parametrize(
    ("fields", "tokenizer", "words"),
    [
        ({"preset": "300M"}, 100, "model.preset='300M'.*tiny, 300m, 700m, 1b3, 7b.*did you mean '300m'"),
        ({"preset": "1.3b"}, 100, "did you mean '1b3'"),
        ({"preset": "gigantic"}, 100, "choose one of tiny"),
        ({"hidden_size": 250}, 100, "model.hidden_size=250.*model.num_attention_heads=4"),
        ({"hidden_size": 20}, 100, "heads of 5 features"),
        ({"num_query_groups": 3}, 100, "model.num_attention_heads=4.*model.num_query_groups=3"),
        ({"num_layers": 0}, 100, "model.num_layers=0 must be at least 1"),
        ({"vocab_multiple": 0}, 100, "model.vocab_multiple=0"),
        ({"num_experts": 1}, 100, "model.num_experts=1: .*at least 2"),
        ({"num_experts": 4, "moe_router_topk": 0}, 100, "model.moe_router_topk=0.*1 .. model.num_experts=4"),
        (
            {"num_experts": 4, "moe_ffn_hidden_size": 64, "ffn_hidden_size": 128},
            100,
            "model.ffn_hidden_size=128 has no effect.*leave it out",
        ),
        ({"num_experts": 4, "moe_ffn_hidden_size": 0}, 100, "model.moe_ffn_hidden_size=0 must be at least 1"),
        ({"num_experts": 4, "moe_aux_loss_coeff": -1.0}, 100, "model.moe_aux_loss_coeff=-1.0 must not be negative"),
        ({"num_experts": 4, "moe_shared_expert_ffn_hidden_size": -8}, 100, "model.moe_shared_expert_ffn_hidden_size=-8"),
        ({"moe_ffn_hidden_size": 64}, 100, "model.moe_ffn_hidden_size=64 has no effect with model.num_experts=0"),
        ({"vocab_size": 200, "vocab_multiple": 64}, 100, "model.vocab_multiple=64 has no effect beside model.vocab_size=200"),
        ({"vocab_size": 99}, 100, "model.vocab_size=99 is smaller than the tokenizer's 100"),
        ({}, None, "model.vocab_size is not set.*data.path"),
    ],
)
def test_misfits_are_refused_with_field_and_remedy(fields, tokenizer, words):
    with pytest.raises(ValueError, match=words):
        apply_preset(ModelConfig(**fields), tokenizer)


def test_planning_does_not_import_torch():
    code = "import sys, megatron_qsparse.models.accounting, megatron_qsparse.models.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
