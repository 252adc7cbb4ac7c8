"""The engine in one process takes the same steps as plain AdamW; test_invariance.py holds every layout to the engine.

Three steps of a global batch of four micro-batches, clipped at a norm of 1 (all gradients are larger). bf16 is compared with
fp32 master weights kept by hand; a single bf16 weight that rounds the other way after a step moves later losses a little,
so only the first step is held to fp32 rounding there.
"""

import pytest
import torch

from tests.parallel.conftest import ONE, RECOMPUTE
from tests.parallel.training import Case, History


def assert_same(found: History, expected: History, precision: str, loss: float = 2e-6) -> None:
    """Losses (to `loss`, where nothing has been rounded to bf16 yet), gradient norms and the weights after the first step of two runs."""
    steps = len(found.losses)
    losses, norms = torch.tensor(found.losses), torch.tensor(found.norms)
    expected_losses, expected_norms = torch.tensor(expected.losses[:steps]), torch.tensor(expected.norms[:steps])
    assert (norms > 1).all(), "clipping was not exercised"
    assert torch.allclose(losses[0], expected_losses[0], rtol=0, atol=loss)
    assert torch.allclose(norms[0], expected_norms[0], rtol=1e-6, atol=0)
    assert torch.allclose(losses, expected_losses, rtol=0, atol=loss if precision == "fp32" else 2e-5), losses - expected_losses
    assert torch.allclose(norms, expected_norms, rtol=1e-6 if precision == "fp32" else 2e-4, atol=0), norms / expected_norms - 1
    for name, weight in expected.weights.items():
        difference = (found.weights[name] - weight).abs()
        if precision == "fp32":
            assert difference.max() <= 1e-5 * weight.abs().max(), name
        else:
            # Few weights, if any, round the other way: one unit in the last place of bf16 is at most 2^-7 of the value.
            assert (difference <= weight.abs() / 128).all() and difference.count_nonzero() <= 2e-3 * weight.numel() + 1, name


def plain_case(case: Case) -> Case:
    return Case(case.variant, case.precision)


def label(case: Case) -> str:
    parts = [case.variant, case.precision, f"zero{case.stage}"]
    parts += (
        [f"tp{case.tensor}"] * (case.tensor > 1)
        + ["sp"] * case.sequence
        + [f"ep{case.expert}"] * (case.expert > 1)
        + [f"pp{case.pipeline}"] * (case.pipeline > 1)
    )
    return "-".join(parts + ["recompute"] * case.recompute)


@pytest.mark.parametrize("case", ONE, ids=label)
def test_the_engine_alone_is_adamw(plain, one_rank, case):
    assert_same(one_rank[case], plain[case], case.precision)


@pytest.mark.parametrize("case", RECOMPUTE, ids=label)
def test_recomputing_activations_changes_no_bit(one_rank, case):
    found, expected = one_rank[case], one_rank[plain_case(case)]
    assert (found.losses, found.norms) == (expected.losses, expected.norms)
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())


def test_ternary_codes_are_made_once_per_step(one_rank, two_stages):
    """Four micro-batches a step, forward, recomputation and backward use the same codes."""
    quantized = {case: history for case, history in (one_rank | two_stages).items() if "bitnet" in case.variant}
    assert quantized
    for case, history in quantized.items():
        assert history.refreshes == case.steps, case
