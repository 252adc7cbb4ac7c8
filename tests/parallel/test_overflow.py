"""A gradient or a loss that is not finite on one rank: no rank applies the step, and the next step goes on as if nothing had been."""

import math

import pytest
import torch
import torch.distributed as dist

from tests.parallel.helpers import gather
from tests.parallel.training import Case, case_layout, make_engine, micro_batches, take_step

CASES = {
    "fp32": (Case(), math.nan),
    "fp32 stage 2": (Case(stage=2), math.inf),
    "fp32 stage 3": (Case(stage=3), math.nan),
    "bf16": (Case(precision="bf16"), math.nan),
    "bf16 stage 2": (Case(precision="bf16", stage=2), math.nan),
    "bf16 stage 3": (Case("bitnet_groups_subln", "bf16", stage=3), math.inf),
    "fp32 pipeline": (Case(pipeline=2), math.inf),
    "bf16 pipeline": (Case("bitnet_groups_subln", "bf16", pipeline=2), math.inf),
    "bf16 pipeline stage 2": (Case(precision="bf16", pipeline=2, stage=2), math.inf),
    "fp32 experts": (Case("moe", expert=2), math.nan),
    "fp32 experts stage 2": (Case("moe", expert=2, stage=2), math.inf),
    "bf16 experts": (Case("moe", "bf16", expert=2), math.inf),
}

LOSSES = {
    "fp32 loss": (Case(), math.inf),
    "bf16 stage 2 loss": (Case("bitnet_groups_subln", "bf16", stage=2), math.nan),
    "bf16 stage 3 loss": (Case(precision="bf16", stage=3), math.inf),
    "bf16 pipeline loss": (Case(precision="bf16", pipeline=2), math.inf),
    "fp32 experts loss": (Case("moe", expert=2), -math.inf),
}
"""The loss of one micro-batch is, and its gradients are not affected by it."""
CASES |= LOSSES


def _poisoned_runs(rank: int) -> dict[str, dict]:
    return {name: _poisoned_run(name, case, value) for name, (case, value) in CASES.items()}


def _poisoned_run(name: str, case: Case, value: float) -> dict:
    """Two good steps, with a poisoned one and an evaluation in between and without them."""
    found = {}
    with case_layout(case) as parallel:
        clean, engine = make_engine(case, parallel), make_engine(case, parallel)
        factor, added = 1.0, 0.0
        if name in LOSSES:
            # The last rank is of the last pipeline stage.
            if dist.get_rank() == dist.get_world_size() - 1:
                engine.model.register_forward_hook(lambda module, inputs, output: output + added)
        elif dist.get_rank() == 0:
            layer = engine.model.decoder.layers[0]
            # An expert's parameter exists on this rank only.
            poisoned = layer.mlp.experts if case.expert > 1 else layer
            next(poisoned.parameters()).register_hook(lambda grad: grad * factor)
        take_step(clean, 0), take_step(engine, 0)
        before = gather(engine.model)
        factor, added = value, value
        found["poisoned"] = take_step(engine, 1)
        after = gather(engine.model)
        found["unchanged"] = all(torch.equal(before[name], after[name]) for name in before)
        factor, added = 1.0, 0.0
        found["evaluated"] = engine.evaluate(iter(micro_batches(2)), len(micro_batches(2)))
        found["next"], found["expected"] = take_step(engine, 2), take_step(clean, 2)
        weights, expected = gather(engine.model), gather(clean.model)
        found["same end"] = all(torch.equal(weights[name], expected[name]) for name in weights)
    return found


@pytest.fixture(scope="module")
def runs(pool) -> list[dict[str, dict]]:
    return pool.run(_poisoned_runs, 2, timeout=300)


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_skipped_by_every_rank_and_leaves_no_trace(runs, name):
    for rank in runs:
        run = rank[name]
        assert not run["poisoned"].applied and run["poisoned"].grad_norm == math.inf
        assert name not in LOSSES or not math.isfinite(run["poisoned"].loss)
        assert run["unchanged"]
        assert run["next"].applied and run["next"] == run["expected"]
        assert run["same end"]


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_has_the_training_loss_and_leaves_no_trace(runs, name):
    """It ran before the step that the test above compares bit for bit."""
    for rank in runs:
        assert rank[name]["evaluated"] == rank[name]["next"].loss
