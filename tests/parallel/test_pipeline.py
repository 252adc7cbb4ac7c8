"""Two pipeline stages take the same steps as one process; without the reset of DeepSpeed's bookkeeping they do not."""

from dataclasses import replace

import pytest
import torch

from tests.parallel.conftest import PIPELINE, PIPELINE_RECOMPUTE, PIPELINE_STAGE_2, TWO_COPIES, UNRESET
from tests.parallel.test_zero import assert_same, label, plain_case
from tests.parallel.training import Case

TIED_BF16 = Case("tied_bitnet_subln", "bf16", pipeline=2)
UNTIED = [case for case in (*PIPELINE, *PIPELINE_STAGE_2) if case != TIED_BF16]


@pytest.mark.parametrize("case", UNTIED, ids=label)
def test_two_stages_are_one_process(plain, one_rank, two_ranks, case):
    assert_same(two_ranks[case], plain[plain_case(case)], case.precision)
    assert_same(two_ranks[case], one_rank[plain_case(case)], case.precision)


@pytest.mark.parametrize("case", PIPELINE_RECOMPUTE, ids=label)
def test_recomputing_activations_changes_no_bit_of_a_pipeline(two_ranks, case):
    found, expected = two_ranks[case], two_ranks[replace(case, recompute=False)]
    assert (found.losses, found.norms) == (expected.losses, expected.norms)


def test_copies_of_a_tied_embedding_stay_equal(two_ranks):
    for case in (case for case in PIPELINE if "tied" in case.variant):
        weights = two_ranks[case].weights
        assert torch.equal(weights["embedding.word_embeddings.weight"], weights["output_layer.weight"])


def test_a_tied_embedding_in_bf16_adds_its_two_gradients_in_fp32(plain, two_ranks):
    """One process rounds the sum of both uses to bf16, two stages round each use: the reference keeps two copies."""
    assert_same(two_ranks[TIED_BF16], plain[TWO_COPIES], "bf16")


@pytest.mark.parametrize("case", UNRESET, ids=label)
def test_the_reset_before_each_backward_is_needed(one_rank, two_ranks, case):
    """Should this fail after an update of DeepSpeed, `ScheduledModel` no longer needs its hook."""
    expected = one_rank[plain_case(case)].norms[0]
    assert abs(two_ranks[case].norms[0] / expected - 1) > 1e-2
