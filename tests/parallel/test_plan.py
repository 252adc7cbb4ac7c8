"""What the plan says of a rank's memory against the tensors that a real engine holds after a step."""

import pytest
import torch

from megatron_qsparse.models.memory import Layout, memory_per_rank
from tests.parallel.helpers import SEQUENCE, VARIANTS, layout
from tests.parallel.training import Case, make_engine, take_step

CASES = [Case("groups", precision, stage=stage) for precision in ("bf16", "fp32") for stage in (1, 2, 3)]
CASES += [Case("moe", precision, expert=2) for precision in ("bf16", "fp32")]
GRADIENTS = ("fp32_groups_gradients_flat", "averaged_gradients", "grad_partitions_flat_buffer", "all_grad_tensors")
"""Attributes of DeepSpeed's optimizers that hold accumulated gradients."""


def _held(engine) -> dict[str, int]:
    """Bytes, by tensor storage, of weights, gradients and optimizer state."""
    optimizer, params = engine.optimizer, list(engine.model.parameters())
    states = [tensor for state in optimizer.optimizer.state.values() for tensor in state.values() if tensor.numel() > 1]
    masters = [param for group in optimizer.optimizer.param_groups for param in group["params"]]
    masters += _tensors(vars(optimizer).get("fp32_partitioned_groups_flat"))
    gradients = [param.grad for param in (*params, *masters) if param.grad is not None]
    gradients += _tensors([vars(optimizer).get(name) for name in GRADIENTS])
    return {
        "weights": _bytes([param.ds_tensor if engine.stage == 3 else param for param in params]),
        "gradients": _bytes(gradients),
        "optimizer": _bytes([*masters, *states]),
    }


def _tensors(nested) -> list[torch.Tensor]:
    if torch.is_tensor(nested):
        return [nested]
    parts = nested.values() if isinstance(nested, dict) else nested if isinstance(nested, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _held_before_the_update(engine) -> dict[str, int]:
    """When all micro-batches have been through, no gradient has been given back yet."""
    found, update = {}, engine.engine.step

    def measured_update():
        found.update(_held(engine))
        return update()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.engine, "step", measured_update)
        take_step(engine, 1)
    return found


def _measure(rank: int) -> dict[Case, dict[str, int]]:
    found = {}
    for case in CASES:
        with layout(expert=case.expert) as parallel:
            engine = make_engine(case, parallel)
            take_step(engine, 0)
            found[case] = _held_before_the_update(engine)
    return found


@pytest.fixture(scope="module")
def measured(pool) -> dict[Case, dict[str, int]]:
    return pool.run(_measure, 2)[0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.variant}-{case.precision}-zero{case.stage}")
def test_the_plan_counts_what_an_engine_holds(measured, case):
    model, qsparse, bitnet = VARIANTS[case.variant]
    where = Layout(data=2, expert=case.expert, zero_stage=case.stage)
    planned = memory_per_rank(model, where, qsparse, bitnet, case.precision, 1, SEQUENCE)
    for part, held in measured[case].items():
        # DeepSpeed pads what it cuts into equal parts.
        assert getattr(planned, part) == pytest.approx(held, rel=1e-3), part
