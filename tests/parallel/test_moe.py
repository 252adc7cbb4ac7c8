"""Mixtures of experts take the same steps on every layout as plain AdamW in one process, experts without tokens included.

Two or four real ranks. Which tokens meet in one product depends on the layout, and with it the rounding of expert gradients.
In fp32 that is far below the tolerance, but an int8 code near a tie may flip after the first update, so the quantized model
is held to its first step. In bf16 the reference rounds as the ranks do.
"""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch

from tests.parallel.helpers import build, gather
from tests.parallel.test_zero import assert_same, label
from tests.parallel.training import DECAY, LR, Case, History, case_layout, make_engine, take_step, train, train_all, train_plainly

DENSE, QUANTIZED = Case("moe"), Case("moe_bitnet_groups_subln", steps=1)
FP32 = [DENSE, QUANTIZED]
BF16 = [replace(case, precision="bf16") for case in FP32]
STARVED = [replace(case, starved=2) for case in FP32]
BF16_EXPERT = [replace(case, expert=2) for case in BF16]
BF16_TWICE = [replace(case, expert=2, data=4) for case in BF16]
"""References for two expert-parallel ranks, of two and of four data-parallel ones: rounded as they round."""
PLAIN = [*FP32, *BF16, *STARVED, *BF16_EXPERT, *BF16_TWICE]
EP2_TP2 = {"expert": 2, "tensor": 2, "sequence": True}

ALONE = [*FP32, *BF16]
"""What test_invariance.py compares layouts with."""
ON_TWO = [
    *FP32, *(replace(case, stage=stage) for case in BF16 for stage in (1, 2)), replace(DENSE, expert=2),
    *(replace(case, expert=2, stage=2) for case in FP32), *(replace(case, expert=2, stage=stage) for case in BF16 for stage in (1, 2)),
    *(replace(case, expert=2) for case in STARVED),
    *(replace(case, expert=2, dispatcher="allgather") for case in FP32),
    *(replace(case, tensor=2, sequence=True, steps=1) for case in (*FP32, *STARVED)),
    replace(BF16[0], pipeline=2), replace(DENSE, pipeline=2, recompute=True),
    *(replace(case, stage=3) for case in (*FP32, *BF16, *STARVED)),
]  # fmt: skip
ON_FOUR = [
    *(replace(case, expert=2, pipeline=2) for case in BF16),
    replace(DENSE, expert=2, pipeline=2, stage=2), replace(QUANTIZED, expert=2, pipeline=2, recompute=True),
    *(replace(case, **EP2_TP2, steps=1, stage=2) for case in FP32),
    replace(QUANTIZED, **EP2_TP2, dispatcher="allgather"), replace(QUANTIZED, **EP2_TP2, starved=2),
    replace(DENSE, expert=2), replace(DENSE, expert=2, stage=2), replace(DENSE, expert=4), *BF16_TWICE,
]  # fmt: skip
BF16_TENSOR = replace(BF16[0], **EP2_TP2, steps=1)
MISTAKES = {
    "experts treated as dense": replace(DENSE, expert=2),
    "experts treated as dense, bf16": BF16_EXPERT[0],
    "aux loss of every micro-batch at full weight": replace(DENSE, expert=2),
}
SPREAD = ({}, {"expert": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"recompute": True}, {"pipeline": 2, "recompute": True})
MEASURED = [replace(case, **changes) for case in (DENSE, QUANTIZED) for changes in SPREAD]


def _on_two(rank: int) -> dict:
    found = train_all(rank, ON_TWO)
    for mistake, case in MISTAKES.items():
        with _make(mistake):
            found[mistake] = train(case)
    for sizes in ({}, {"expert": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}):
        with case_layout(replace(DENSE, **sizes)) as parallel:
            found.setdefault("initial", []).append(
                {variant: gather(build(variant, parallel)) for variant in (DENSE.variant, QUANTIZED.variant)}
            )
    found["metrics"] = {case: _metrics(case) for case in MEASURED}
    return found


def _on_four(rank: int) -> dict:
    found = train_all(rank, [*ON_FOUR, BF16_TENSOR])
    with case_layout(BF16_TENSOR) as parallel, _make("experts' norm without the tensor-parallel ranks"):
        found["norm"] = take_step(make_engine(BF16_TENSOR, parallel), 0).grad_norm
    return found


def _make(mistake: str):
    """What a careless implementation would do."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_qsparse.parallel import expert_groups, zero

    if mistake.startswith("experts treated as dense"):

        def forget(model):
            for param in expert_groups.expert_parameters(model):
                param.allreduce = True

        return mock.patch.object(zero, "register_experts", forget)
    if mistake.startswith("aux loss"):
        MoEAuxLossAutoScaler.main_loss_backward_scale.fill_(1.0)
        return mock.patch.object(MoEAuxLossAutoScaler, "set_loss_scale", lambda scale: None)
    from deepspeed.utils import groups

    return mock.patch.object(groups, "_get_expert_model_parallel_world_size", lambda: 1)


def _metrics(case: Case) -> dict[str, float]:
    """Measured during the first step."""
    with case_layout(case) as parallel:
        engine = make_engine(case, parallel)
        engine.meters.start(), engine.expert_meters.start()
        take_step(engine, 0)
        return {**engine.meters.stop(), **engine.expert_meters.stop()}


@pytest.fixture(scope="module")
def plain(pool) -> dict[Case, History]:
    return pool.run(train_plainly, 1, PLAIN)[0]


@pytest.fixture(scope="module")
def alone(pool) -> dict[Case, History]:
    return pool.run(train_all, 1, ALONE)[0]


@pytest.fixture(scope="module")
def on_two(pool) -> dict:
    return pool.run(_on_two, 2, timeout=400)[0]


@pytest.fixture(scope="module")
def on_four(pool) -> dict:
    return pool.run(_on_four, 4, timeout=400)[0]


def _reference(plain: dict[Case, History], case: Case) -> History:
    # In fp32 it is the same for any number of expert-parallel ranks.
    expert = case.expert if case.precision == "bf16" else 1
    steps = 1 if "bitnet" in case.variant else 3
    return plain[Case(case.variant, case.precision, expert=expert, data=case.data, starved=case.starved, steps=steps)]


def _name(case: Case) -> str:
    return "-".join([label(case), case.dispatcher] + ["starved"] * bool(case.starved) + ["four"] * bool(case.data))


@pytest.mark.parametrize("case", ALONE, ids=_name)
def test_the_engine_alone_is_adamw(plain, alone, case):
    assert_same(alone[case], _reference(plain, case), case.precision)


@pytest.mark.parametrize("case", ON_TWO, ids=_name)
def test_two_ranks_are_adamw_in_one_process(plain, on_two, case):
    assert_same(on_two[case], _reference(plain, case), case.precision)


@pytest.mark.parametrize("case", ON_FOUR, ids=_name)
def test_four_ranks_are_adamw_in_one_process(plain, on_four, case):
    assert_same(on_four[case], _reference(plain, case), case.precision)


def _difference(check: Callable[[], None]) -> str:
    """What an assertion said of loss, norm or weights."""
    with pytest.raises(AssertionError) as caught:
        check()
    return str(caught.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_finds(plain, on_two, mistake):
    case = MISTAKES[mistake]
    assert "clipping" not in _difference(lambda: assert_same(on_two[mistake], _reference(plain, case), case.precision))


def test_with_bf16_the_norm_counts_the_experts_of_all_tensor_parallel_ranks(plain, on_four):
    """Tensor-parallel ranks round their partial sums to bf16, so loss and norm are near those of one process, not equal."""
    expected, found, without = plain[BF16_EXPERT[0]], on_four[BF16_TENSOR], on_four["norm"]
    assert found.losses[0] == pytest.approx(expected.losses[0], abs=2e-2)
    assert found.norms[0] == pytest.approx(expected.norms[0], rel=5e-3)
    assert without < 0.98 * expected.norms[0]


@pytest.mark.parametrize("variant", ["moe", "moe_bitnet_groups_subln"])
def test_every_layout_starts_from_the_same_bits(on_two, variant):
    one, *others = (weights[variant] for weights in on_two["initial"])
    experts = [one[f"decoder.layers.1.mlp.experts.local_experts.{number}.linear_fc1.weight"] for number in range(4)]
    assert not any(torch.equal(experts[0], other) for other in experts[1:])
    for other in others:
        assert other.keys() == one.keys() and [name for name in one if not torch.equal(one[name], other[name])] == []


def test_experts_without_tokens_get_a_gradient_of_zero(plain, on_two):
    """Weight decay alone changes them: lr * decay = 1e-3 of each entry."""
    for case in (replace(DENSE, expert=2, starved=2), replace(DENSE, tensor=2, sequence=True, steps=1, starved=2)):
        starved, fed = on_two[case].weights, plain[DENSE].weights
        for name in (name for name in starved if ".local_experts." in name):
            decayed = int(name.split(".local_experts.")[1][0]) < 2
            assert torch.equal(starved[name], on_two["initial"][0]["moe"][name] * (1 - LR * DECAY)) == decayed, name
            assert not torch.equal(starved[name], fed[name])


@pytest.mark.parametrize("variant", ["moe", "moe_bitnet_groups_subln"])
def test_metrics_do_not_depend_on_the_layout(on_two, variant):
    """Sparsity of inputs whose masks may have flipped at a near-tie is the same to 1e-3."""
    one, *others = (metrics for case, metrics in on_two["metrics"].items() if case.variant == variant)
    layers, experts = 2, 4
    loads = [[one[f"experts/layers.{layer}.{expert}/load"] for expert in range(experts)] for layer in range(layers)]
    for layer, row in enumerate(loads):
        assert sum(row) == pytest.approx(1)
        assert (one[f"moe/layers.{layer}/load_max"], one[f"moe/layers.{layer}/load_min"]) == (max(row), min(row))
    assert (one["moe/load_max"], one["moe/load_min"]) == (max(map(max, loads)), min(map(min, loads)))
    # 1 when balanced; two of four experts for a token, so at most 2.
    assert 0.9 < one["moe/aux_loss"] < 2
    for other in others:
        assert other.keys() == one.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, abs=1e-3 if "moe_bitnet" in variant and "sparsity" in name else 1e-6), name
