"""Two pipeline stages with two chunks of layers each (interleaved 1F1B); test_invariance.py compares their steps."""

from dataclasses import replace

import pytest
import torch

from tests.parallel.helpers import layout
from tests.parallel.training import Case, make_engine, micro_batches, take_step

INTERLEAVED = Case("bitnet_groups_subln", layers=4, pipeline=2, virtual=2)


def _on_two(rank: int, directory) -> dict:
    from megatron_qsparse.parallel import checkpoint

    found = {}
    with layout(pipeline=2, virtual=2) as parallel:
        engine = make_engine(INTERLEAVED, parallel)
        found["layers"] = [layer.layer_number for chunk in engine.model.chunks for layer in chunk.decoder.layers]
        batches = micro_batches(0)
        found["evaluated"], found["step"] = engine.evaluate(iter(batches), len(batches)), take_step(engine, 0)
        directory.mkdir(exist_ok=True)
        torch.distributed.barrier()
        checkpoint.save(engine, directory)
        found["next"] = take_step(engine, 1)
    with layout(pipeline=2) as parallel:
        engine = make_engine(replace(INTERLEAVED, virtual=1), parallel)
        checkpoint.load(engine, directory)
        found["resumed"] = take_step(engine, 1)
    return found


@pytest.fixture(scope="module")
def two(pool, tmp_path_factory) -> list[dict]:
    return pool.run(_on_two, 2, tmp_path_factory.mktemp("interleaved") / "state", timeout=300)


def test_stages_hold_every_other_chunk(two):
    assert [rank["layers"] for rank in two] == [[1, 3], [2, 4]]


def test_evaluation_has_the_training_loss(two):
    assert all(rank["evaluated"] == rank["step"].loss for rank in two)


def test_a_checkpoint_goes_on_without_interleaving(two):
    assert all(rank["resumed"] == rank["next"] for rank in two)
