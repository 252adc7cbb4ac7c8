"""Initial weights are a function of seed and name alone, and what a layout cannot do is refused when the engine is made."""

import gc

import pytest
import torch

from tests.parallel.helpers import build, gather, layout
from tests.parallel.training import Case, make_engine, micro_batches, take_step

VARIANTS = ("tied_bitnet_subln", "bitnet_groups_subln", "one_kv_head")
LAYOUTS = {"one": (1, 1, False), "tensor": (2, 1, False), "sequence": (2, 1, True), "pipeline": (1, 2, False)}


def _initial_weights(rank: int) -> dict:
    found = {}
    for name, (tensor, pipeline, sequence) in LAYOUTS.items():
        with layout(tensor, pipeline, sequence) as parallel:
            for variant in VARIANTS:
                model = build(variant, parallel, seed=5)
                found[variant, name] = gather(model)
                found["split", variant, name] = sum(getattr(p, "tensor_model_parallel", False) for p in model.parameters())
    with layout() as parallel:
        found["other seed"] = gather(build("bitnet_groups_subln", parallel, seed=6))
        found["bf16"] = gather(build("one_kv_head", parallel, torch.bfloat16, seed=5))
    found["refusals"] = _refusals()
    found["stale"], found["counted"] = _engine_options()
    found["frozen"] = gc.get_freeze_count()
    return found


def _refusals() -> list[str]:
    messages = []
    for case in (Case("tied", pipeline=2, stage=2), Case(pipeline=2, stage=3), Case(stage=0)):
        with layout(case.tensor, case.pipeline) as parallel, pytest.raises(ValueError) as caught:
            make_engine(case, parallel)
        messages.append(str(caught.value))
    return messages


def _engine_options() -> tuple[str, list[dict]]:
    """(what `check_codes` says of a weight written between two steps; sparsity measured over an evaluation, over a step)"""
    case = Case("bitnet_groups_subln")
    with layout() as parallel:
        engine = make_engine(case, parallel)
        batches = micro_batches(0)
        engine.meters.start()
        engine.evaluate(iter(batches), len(batches))
        counted = [engine.meters.stop()]
        engine.meters.start()
        take_step(engine, 0)
        counted.append(engine.meters.stop())
        engine.check_codes = True
        take_step(engine, 1)
        engine.evaluate(iter(batches), len(batches))
        engine.model.decoder.layers[1].mlp.linear_fc2.weight.data.mul_(1.001)
        with pytest.raises(RuntimeError) as caught:
            take_step(engine, 2)
    return str(caught.value), counted


@pytest.fixture(scope="module")
def weights(pool) -> dict:
    return pool.run(_initial_weights, 2)[0]


@pytest.mark.parametrize("name", ["tensor", "sequence", "pipeline"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layout_starts_from_the_same_bits(weights, variant, name):
    one, other = weights[variant, "one"], weights[variant, name]
    second_copy = {"output_layer.weight"} if variant.startswith("tied") and name == "pipeline" else set()
    assert set(other) == set(one) | second_copy
    for key, weight in one.items():
        assert torch.equal(other[key], weight), key
    for key in second_copy:
        assert torch.equal(other[key], one["embedding.word_embeddings.weight"])


def test_sharded_parameters_carry_the_attribute_that_norms_and_loading_read(weights):
    # Embedding and (untied) head, and four projections and two SubLN weights of two layers.
    assert weights["split", "bitnet_groups_subln", "tensor"] == 2 + 2 * 6
    assert weights["split", "tied_bitnet_subln", "sequence"] == 1 + 2 * 6
    assert weights["split", "one_kv_head", "tensor"] == 2 + 2 * 4


def test_the_seed_and_the_name_decide(weights):
    one, other = weights["bitnet_groups_subln", "one"], weights["other seed"]
    matrices = [name for name in one if one[name].dim() == 2]
    assert len(matrices) == 10
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    same_shape = [one[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"] for layer in (0, 1)]
    assert not torch.equal(*same_shape)
    assert all((one[name] == 1).all() for name in one if one[name].dim() == 1)


def test_residual_outputs_start_smaller(weights):
    one = weights["bitnet_groups_subln", "one"]
    for name, weight in one.items():
        if weight.dim() == 2:
            # init_std / sqrt(2 * layers) with two layers is half of init_std = 0.1.
            std = 0.05 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0.1
            assert weight.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(weight.mean().item()) < 0.005


def test_bf16_starts_from_the_rounded_weights(weights):
    for name, weight in weights["one_kv_head", "one"].items():
        assert torch.equal(weights["bf16"][name], weight.to(torch.bfloat16))


def test_stages_that_cannot_work_are_refused(weights):
    tied, three, zero = weights["refusals"]
    assert "tied embeddings" in tied and "stage 1" in tied
    assert "stage 3" in three and "pipeline" in three and "stage 0" in zero


def test_the_engine_finds_codes_that_are_stale(weights):
    assert weights["stale"].startswith("layers.1.mlp.down: ") and "stale" in weights["stale"]


def test_sparsity_is_measured_in_training_and_not_in_evaluation(weights):
    evaluation, step = weights["counted"]
    assert evaluation == {}
    # keep = 0.4 of 64 features is 26.
    assert len(step) == 4 and all(sparsity >= 1 - 26 / 64 for sparsity in step.values())


def test_objects_that_were_frozen_before_the_engines_stay_frozen(weights):
    """By `tests.preload`; DeepSpeed's start is run with everything frozen."""
    assert weights["frozen"] > 100_000
