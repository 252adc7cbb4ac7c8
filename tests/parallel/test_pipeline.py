"""Two pipeline stages take the same steps as one process; without the reset of DeepSpeed's bookkeeping they do not."""

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.conftest import PIPELINE, PIPELINE_RECOMPUTE, PIPELINE_STAGE_2, UNRESET
from tests.parallel.helpers import layout
from tests.parallel.test_zero import assert_same, label, plain_case
from tests.parallel.training import Case, make_engine, take_step, train_plainly

TIED_BF16 = Case("tied_bitnet_subln", "bf16", pipeline=2)
UNTIED = [case for case in (*PIPELINE, *PIPELINE_STAGE_2) if case != TIED_BF16]


@pytest.mark.parametrize("case", UNTIED, ids=label)
def test_two_stages_are_one_process(plain, one_rank, two_ranks, case):
    assert_same(two_ranks[case], plain[plain_case(case)], case.precision)
    assert_same(two_ranks[case], one_rank[plain_case(case)], case.precision)


@pytest.mark.parametrize("case", PIPELINE_RECOMPUTE, ids=label)
def test_recomputing_activations_changes_no_bit_of_a_pipeline(two_ranks, case):
    found, expected = two_ranks[case], two_ranks[Case(case.variant, case.precision, pipeline=2)]
    assert (found.losses, found.norms) == (expected.losses, expected.norms)


def test_copies_of_a_tied_embedding_stay_equal(two_ranks):
    for case in (case for case in PIPELINE if "tied" in case.variant):
        weights = two_ranks[case].weights
        assert torch.equal(weights["embedding.word_embeddings.weight"], weights["output_layer.weight"])


def test_a_tied_embedding_in_bf16_adds_its_two_gradients_in_fp32(two_ranks):
    """One process rounds the sum of both uses to bf16, two stages round each use: the reference keeps two copies."""
    case = Case("tied_bitnet_subln", "bf16", two_copies=True)
    expected = run_distributed(train_plainly, 1, [case])[0][case]
    assert_same(two_ranks[TIED_BF16], expected, "bf16")


@pytest.mark.parametrize("case", UNRESET, ids=label)
def test_the_reset_before_each_backward_is_needed(one_rank, two_ranks, case):
    """Should this fail after an update of DeepSpeed, `ScheduledModel` no longer needs its hook."""
    expected = one_rank[plain_case(case)].norms[0]
    assert abs(two_ranks[case].norms[0] / expected - 1) > 1e-2


def _refusals(rank: int) -> list[str]:
    messages = []
    for case in (Case("tied", pipeline=2, stage=2), Case(stage=3), Case(stage=0)):
        with layout(case.tensor, case.pipeline) as parallel, pytest.raises(ValueError) as caught:
            take_step(make_engine(case, parallel), 0)
        messages.append(str(caught.value))
    return messages


def test_stages_that_cannot_work_are_refused():
    tied, three, zero = run_distributed(_refusals, 2)[1]
    assert "tied embeddings" in tied and "stage 1" in tied
    assert "stage 3" in three and "stage 0" in zero
