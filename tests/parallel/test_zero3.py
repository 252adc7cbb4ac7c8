"""ZeRO-3 has parameters that are empty whenever their module is not at work, and takes the steps of ZeRO-1.

test_invariance.py compares most steps; here are those of DeepSpeed's settings and of variants and precisions it leaves out.
Where a case does not say otherwise nothing is kept whole (`make_engine`): no parameter is small enough to stay, none is held
from its forward to its backward, and none is gathered ahead.
"""

from dataclasses import replace

import pytest
import torch

from tests.parallel.helpers import layout
from tests.parallel.test_zero import assert_same, label
from tests.parallel.training import Case, History, make_engine, micro_batches, take_step, train_all

QUANTIZED = Case("bitnet_groups_subln", stage=3, steps=2)
LARGE, SMALL = (0, 1_000_000_000, 50_000_000), (100_000, 1_000_000_000, 50_000_000)
"""DeepSpeed's defaults as a large model meets them, whose matrices are above the persistence threshold, and a small one."""
DATA = [
    replace(QUANTIZED, partition=LARGE), replace(QUANTIZED, partition=SMALL),
    Case("tied_bitnet_subln", stage=3, steps=2), Case("tied_bitnet_subln", "bf16", stage=3, recompute=True, steps=2),
]  # fmt: skip
ON_FOUR = [
    Case("tied_bitnet_subln", "bf16", tensor=2, stage=3, steps=2),
    Case("bitnet_global_rescale", tensor=2, stage=3, recompute=True, steps=2),
]
"""Two by two tensor- and data-parallel ranks."""
WATCHED = [
    QUANTIZED, replace(QUANTIZED, partition=LARGE), replace(QUANTIZED, recompute=True), Case("tied", stage=3),
    replace(QUANTIZED, tensor=2, sequence=True),
]  # fmt: skip


def stage_1(case: Case) -> Case:
    return replace(case, stage=1, partition=(0, 0, 0))


def identifier(case: Case) -> str:
    return label(case) + {LARGE: "-large", SMALL: "-small"}.get(case.partition, "")


def _two_ranks(rank: int) -> dict:
    found = train_all(rank, list(dict.fromkeys([*DATA, *map(stage_1, DATA)])))
    return {**found, "watched": {case: _watch(case) for case in WATCHED}, "errors": _errors()}


def _watch(case: Case) -> dict:
    """Which parameters are whole when, and what the engine does between steps."""
    found = {"between": [], "at work": [], "after the forward": []}
    with layout(case.tensor, case.pipeline, case.sequence) as parallel:
        engine = make_engine(case, parallel)
        named = dict(engine.model.named_parameters())

        def note(moment: str) -> None:
            found[moment].append(sorted(name for name, param in named.items() if param.numel()))

        linear = engine.model.decoder.layers[0].mlp.linear_fc2
        # Made after DeepSpeed's hooks, these see what DeepSpeed leaves.
        linear.register_forward_pre_hook(lambda *_: note("at work"))
        engine.model.register_forward_hook(lambda *_: note("after the forward"))
        note("between")
        engine.meters.start()
        take_step(engine, 0)
        found["sparsity"] = engine.meters.stop()
        note("between")
        engine.check_codes = True
        take_step(engine, 1)
        found["evaluated"] = engine.evaluate(iter(micro_batches(2)), len(micro_batches(2)))
        note("between")
        found["step"] = take_step(engine, 2)
        note("between")
        found["codes"] = [weight.codes for weight in engine.ternary.weights]
        found["refreshes"] = engine.ternary.refreshes
        found["names"] = sorted(named)
    return found


def _errors() -> dict[str, str]:
    from megatron_qsparse.parallel.partition import gathered, write

    found = {}
    with layout() as parallel:
        engine = make_engine(QUANTIZED, parallel)
        take_step(engine, 0)
        with pytest.raises(RuntimeError) as caught:
            batch = micro_batches(0)[0]
            engine.engine(batch[:, :-1].contiguous(), torch.arange(16).expand(1, -1), None, labels=batch[:, 1:].contiguous())
        found["no refresh"] = str(caught.value)
    with layout() as parallel:
        engine = make_engine(QUANTIZED, parallel)
        take_step(engine, 0)
        engine.ternary.refresh()
        weight = engine.model.decoder.layers[1].mlp.linear_fc2.weight
        with gathered([weight]):
            whole = weight.detach() * 1.001
        write(weight, whole)
        with gathered([weight]):
            found["written"] = torch.equal(weight, whole)
        engine.check_codes = True
        with pytest.raises(RuntimeError) as caught:
            take_step(engine, 1)
        found["stale"] = str(caught.value)
    return found


@pytest.fixture(scope="module")
def two_ranks(pool) -> dict:
    return pool.run(_two_ranks, 2, timeout=300)[0]


@pytest.fixture(scope="module")
def four_ranks(pool) -> dict[Case, History]:
    return pool.run(train_all, 4, [*ON_FOUR, *map(stage_1, ON_FOUR)])[0]


def _assert_same(found: History, expected: History, precision: str) -> None:
    assert_same(found, expected, precision, loss=8e-7)
    assert found.weights.keys() == expected.weights.keys() and found.refreshes == expected.refreshes


@pytest.mark.parametrize("case", DATA, ids=identifier)
def test_two_ranks_take_the_steps_of_stage_1(two_ranks, case):
    _assert_same(two_ranks[case], two_ranks[stage_1(case)], case.precision)


@pytest.mark.parametrize("case", ON_FOUR, ids=identifier)
def test_two_by_two_ranks_take_the_steps_of_stage_1(four_ranks, case):
    _assert_same(four_ranks[case], four_ranks[stage_1(case)], case.precision)


@pytest.mark.parametrize("case", WATCHED, ids=identifier)
def test_parameters_are_empty_except_at_work(two_ranks, case):
    watched = two_ranks["watched"][case]
    assert watched["between"] == [[]] * 4
    own = "decoder.layers.0.mlp.linear_fc2.weight"
    # The head borrows a tied embedding, which DeepSpeed then keeps for the whole forward of the model.
    borrowed = {"embedding.word_embeddings.weight"} if case.variant == "tied" else set()
    assert watched["at work"] and watched["after the forward"]
    if case.partition == LARGE:
        return
    for whole in watched["at work"]:
        assert own in whole and set(whole) - borrowed <= {own, "decoder.layers.0.mlp.linear_fc2.sub_norm.weight"}
    for whole in watched["after the forward"]:
        assert set(whole) <= borrowed


@pytest.mark.parametrize("case", WATCHED, ids=identifier)
def test_no_codes_are_kept_and_alphas_are_made_once_a_step(two_ranks, case):
    watched = two_ranks["watched"][case]
    assert len(watched["codes"]) == (8 if "bitnet" in case.variant else 0) and set(watched["codes"]) <= {None}
    assert watched["refreshes"] == 3


@pytest.mark.parametrize("case", WATCHED, ids=identifier)
def test_evaluation_and_sparsity_work_between_steps(two_ranks, case):
    watched = two_ranks["watched"][case]
    assert watched["evaluated"] == watched["step"].loss and watched["step"].applied
    assert len(watched["sparsity"]) == 4 and all(sparsity >= 1 - 26 / 64 for sparsity in watched["sparsity"].values())


def test_a_forward_without_alphas_is_an_error_and_not_a_gather_within_it(two_ranks):
    assert "refresh() must come before the forward" in two_ranks["errors"]["no refresh"]


def test_a_written_share_is_found_stale(two_ranks):
    assert two_ranks["errors"]["written"]
    assert two_ranks["errors"]["stale"].startswith("layers.1.mlp.down: ") and "stale" in two_ranks["errors"]["stale"]
