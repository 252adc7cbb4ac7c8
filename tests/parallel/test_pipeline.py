"""What a pipeline of two stages does with recomputation and with the two copies of a tied embedding."""

from dataclasses import replace

import pytest
import torch

from tests.parallel.conftest import PIPELINE, PIPELINE_RECOMPUTE, TWO_COPIES
from tests.parallel.test_zero import assert_same, label
from tests.parallel.training import Case


@pytest.mark.parametrize("case", PIPELINE_RECOMPUTE, ids=label)
def test_recomputing_activations_changes_no_bit_of_a_pipeline(two_stages, case):
    found, expected = two_stages[case], two_stages[replace(case, recompute=False)]
    assert (found.losses, found.norms) == (expected.losses, expected.norms) and found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[name], weight) for name, weight in expected.weights.items())


def test_copies_of_a_tied_embedding_stay_equal(two_stages):
    for case in (case for case in PIPELINE if "tied" in case.variant):
        weights = two_stages[case].weights
        assert torch.equal(weights["embedding.word_embeddings.weight"], weights["output_layer.weight"])


def test_a_tied_embedding_in_bf16_adds_its_two_gradients_in_fp32(plain, two_stages):
    """One process rounds the sum of both uses to bf16, two stages round each use: the reference keeps two copies."""
    assert_same(two_stages[Case("tied_bitnet_subln", "bf16", pipeline=2)], plain[TWO_COPIES], "bf16")
