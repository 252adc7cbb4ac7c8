"""What a saved state holds besides tensors that training steps on, how it is written meanwhile, and what is refused."""

import random
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.parallel.helpers import VARIANTS, build, gather, layout, tokens
from tests.parallel.training import DECAY, LR, Case, make_engine, micro_batches, take_step

CASE = Case(precision="bf16")
RAGGED = [Case(stage=stage) for stage in (1, 2, 3)]
"""Three data-parallel ranks: the sizes of most parameters are no multiple of three."""


def _draw() -> list:
    """A number from every generator of this process."""
    from megatron.core import tensor_parallel

    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand(2).tolist()
    return [random.random(), np.random.rand(2).tolist(), torch.rand(2).tolist(), tracked]


def _alone(root: Path, name: str) -> Path:
    """A directory that rank 0 makes before any rank goes on."""
    (root / name).mkdir(exist_ok=True)
    torch.distributed.barrier()
    return root / name


def _on_two_ranks(rank: int, root: Path) -> dict:
    return {
        "generators": _generators(root), "background": _background(root), "weights": _weights_only(root), "failure": _failure(rank, root),
        "refused": _refused(root), "megatron": _read_by_megatron(root), "older": _older(root), "from three": _loaded_from_three(root),
    }  # fmt: skip


def _generators(root: Path) -> dict:
    from megatron_qsparse.parallel import checkpoint

    directory = _alone(root, "generators")
    with layout() as parallel:
        engine = make_engine(CASE, parallel)
        random.seed(1)
        np.random.seed(2)
        _draw()
        checkpoint.save(engine, directory)
        expected = _draw()
        _draw()
        restored = checkpoint.load(engine, directory)
        found = {"restored": restored, "equal": _draw() == expected}
    with layout(tensor=2) as parallel:
        engine, anew = make_engine(replace(CASE, tensor=2), parallel), []
        found["restored on another device"] = checkpoint.load(engine, _of_a_gpu(engine, root))
        _draw()
        for _ in range(2):
            found["restored elsewhere"] = checkpoint.load(engine, directory)
            anew.append(_draw())
        ranks = [None, None]
        torch.distributed.all_gather_object(ranks, anew)
    return {**found, "expected": expected, "anew": ranks}


def _of_a_gpu(engine, root: Path) -> Path:
    """A state of this layout with the generators of a GPU, whose states are shorter."""
    from megatron_qsparse.parallel import checkpoint
    from megatron_qsparse.parallel.checkpoint import rng

    directory, states = _alone(root, "gpu"), rng.states
    with pytest.MonkeyPatch.context() as patch:
        tracked = {"model-parallel-rng": bytes(16).hex()}
        patch.setattr(rng, "states", lambda device: states(device) | {"device": "cuda", "megatron": tracked})
        checkpoint.save(engine, directory)
    return directory


def _background(root: Path) -> dict:
    """Two saves, each of which begins to write only after another step; what each holds is the state at its start."""
    from megatron_qsparse.parallel.checkpoint import Output, Saver, load

    directories = [_alone(root, f"background {i}") for i in range(2)]
    published, found = [], {"expected": [], "loaded": []}
    with layout() as parallel:
        engine = make_engine(CASE, parallel)
        saver = Saver(engine)
        for step, directory in enumerate(directories):
            take_step(engine, step)
            found["expected"].append(gather(engine.model))
            trained = threading.Event()
            saver.start([Output(directory=directory, prepare=trained.wait, publish=published.append)])
            take_step(engine, step + 10)
            trained.set()
        while (report := saver.poll()) is None:
            take_step(engine, 20)
        found["report"], found["idle"] = (report.waited_s, report.total_s, report.nbytes), (saver.poll(), saver.wait())
        saver.close()
        for directory in directories:
            load(engine, directory)
            found["loaded"].append(gather(engine.model))
    found["published"] = [sorted(files) for files in published]
    found["on disk"] = [sorted(p.name for p in directory.iterdir()) for directory in directories]
    return found


def _weights_only(root: Path) -> dict:
    from megatron_qsparse.parallel import checkpoint
    from megatron_qsparse.parallel.checkpoint import Output, Saver, load_weights
    from megatron_qsparse.parallel.checkpoint.adam import adam_step

    full, weights = _alone(root, "full"), _alone(root, "weights")
    found: dict = {"engines": {}}
    with layout() as parallel:
        engine = make_engine(CASE, parallel)
        take_step(engine, 0)
        found["expected"], found["evaluated"] = gather(engine.model), engine.evaluate(iter(micro_batches(1)), 2)
        saver = Saver(engine)
        saver.start([Output(directory=full), Output(directory=weights, weights_only=True)])
        saver.wait()
        saver.close()
        for directory in (full, weights):
            model = build(CASE.variant, parallel, dtype=torch.bfloat16, seed=9)
            load_weights(model, directory)
            found[directory.name] = gather(model)
        if torch.distributed.get_rank() == 0:
            # Alone: the other rank is not asked for anything.
            model = build(CASE.variant, parallel, dtype=torch.bfloat16, seed=9)
            load_weights(model, weights)
            found["alone"] = {name: param.detach().clone() for name, param in model.named_parameters()}
        torch.distributed.barrier()
        with pytest.raises(ValueError, match="weights only"):
            checkpoint.load(engine, weights)
    for case in (CASE, replace(CASE, stage=3), replace(CASE, tensor=2)):
        with layout(case.tensor) as parallel:
            engine = make_engine(case, parallel)
            take_step(engine, 5)
            load_weights(engine, weights)
            states = {kind: gather(engine.model, lambda param, kind=kind: _full(param, kind)) for kind in ("fp32", "exp_avg", "exp_avg_sq")}
            loss = engine.evaluate(iter(micro_batches(1)), len(micro_batches(1)))
            found["engines"][case] = (gather(engine.model), states, adam_step(engine), loss)
    found["sizes"] = [sum(p.stat().st_size for p in directory.iterdir()) for directory in (full, weights)]
    return found


def _full(param, kind: str) -> torch.Tensor:
    from megatron_qsparse.compat import deepspeed

    utils = deepspeed.load().utils
    full = utils.safe_get_full_fp32_param(param) if kind == "fp32" else utils.safe_get_full_optimizer_state(param, kind)
    return full.view(param.shape)


def _failure(rank: int, root: Path) -> dict:
    """Rank 1 cannot write its file; the save after it can."""
    from megatron_qsparse.parallel.checkpoint import Output, SaveError, Saver

    blocked, free = _alone(root, "blocked"), _alone(root, "free")
    if rank == 1:
        (blocked / "__1_0.distcp").mkdir()
    published = []
    with layout() as parallel:
        engine = make_engine(CASE, parallel)
        saver = Saver(engine)
        saver.start([Output(directory=blocked, publish=published.append)])
        with pytest.raises(SaveError) as polled:
            while saver.poll() is None:
                take_step(engine, 0)
        saver.start([Output(directory=blocked, publish=published.append)])
        with pytest.raises(SaveError) as waited:
            saver.wait()
        saver.start([Output(directory=blocked, publish=published.append)])
        finished = saver.finish(60)
        assert published == []
        saver.start([Output(directory=free, publish=lambda files: 1 / 0)])
        with pytest.raises(SaveError) as unpublished:
            saver.wait()
        saver.start([Output(directory=free)])
        good = saver.finish(60)
        saver.close()
    return {
        "told": [str(polled.value), str(waited.value), finished], "unpublished": str(unpublished.value), "good": good,
        "nothing": saver.finish(1),
    }  # fmt: skip


def _refused(root: Path) -> dict[str, str]:
    from megatron_qsparse.parallel import checkpoint

    directory, empty = _alone(root, "dense"), _alone(root, "empty")
    with layout() as parallel:
        checkpoint.save(make_engine(CASE, parallel), directory)
    found = {}
    for variant, path in (("subln", directory), ("one_kv_head", directory), ("dense", empty)):
        with layout() as parallel, pytest.raises(ValueError) as caught:
            checkpoint.load(make_engine(replace(CASE, variant=variant), parallel), path)
        found[variant] = str(caught.value)
    return found


def _read_by_megatron(root: Path) -> dict:
    """Written by our writer, read by Megatron's own loader."""
    from megatron.core import dist_checkpointing

    from megatron_qsparse.parallel import checkpoint

    directory = _alone(root, "megatron")
    with layout(pipeline=2) as parallel:
        engine = make_engine(Case(pipeline=2), parallel)
        take_step(engine, 0)
        checkpoint.save(engine, directory)
        return {
            "weights": gather(engine.model), "exp_avg": gather(engine.model, lambda param: _full(param, "exp_avg")),
            "tensors": dist_checkpointing.load_plain_tensors(str(directory)),
        }  # fmt: skip


def _older(root: Path) -> dict:
    """A state as version 1 wrote it: by dist_checkpointing.save of megatron-core 0.16.1, without generators or layout."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    from megatron_qsparse.parallel import checkpoint
    from megatron_qsparse.parallel.checkpoint.adam import adam_step, create_adam_state
    from megatron_qsparse.parallel.checkpoint.places import places

    directory = _alone(root, "older")
    with layout() as parallel:
        engine = make_engine(CASE, parallel)
        take_step(engine, 0)
        create_adam_state(engine, 1)
        weights = engine.model.sharded_state_dict(
            metadata={"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        )
        optimizer = {}
        for place in places(engine.model):
            for kind in ("fp32", "exp_avg", "exp_avg_sq"):
                optimizer[f"{kind}.{place.name}"] = make_sharded_optimizer_tensor(
                    place.sharded, _full(place.tensor, kind), f"optimizer.{kind}"
                )
        expected = gather(engine.model)
        dist_checkpointing.save({"model": weights, "optimizer": optimizer}, str(directory))
        # Since 0.19 such a save keeps what is not sharded among the tensors.
        if dist.get_rank() == 0:
            torch.save({"common": {"format_version": 1, "adam_step": 1}}, directory / "common.pt")
        dist.barrier()
        take_step(engine, 1)
        restored = checkpoint.load(engine, directory)
        return {"expected": expected, "loaded": gather(engine.model), "restored": restored, "step": adam_step(engine)}


def _save_on_three(rank: int, root: Path) -> dict:
    from megatron_qsparse.parallel import checkpoint

    found = {}
    for case in RAGGED:
        directory = _alone(root, f"three {case.stage}")
        with layout() as parallel:
            engine = make_engine(case, parallel)
            engine.train_step(iter(tokens(3, seed=rank).split(1)), 3, LR, DECAY)
            checkpoint.save(engine, directory)
            found[case] = {"weights": gather(engine.model), "exp_avg": gather(engine.model, lambda param: _full(param, "exp_avg"))}
    return found


def _loaded_from_three(root: Path) -> dict:
    from megatron_qsparse.parallel import checkpoint

    found = {}
    for case in RAGGED:
        for stage in (1, 3):
            with layout() as parallel:
                engine = make_engine(replace(case, stage=stage), parallel)
                checkpoint.load(engine, root / f"three {case.stage}")
                state = {"weights": gather(engine.model), "exp_avg": gather(engine.model, lambda param: _full(param, "exp_avg"))}
                found[case, stage] = state
    return found


@pytest.fixture(scope="module")
def on_three(pool, tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("content")
    return root, pool.run(_save_on_three, 3, root, timeout=300)[0]


@pytest.fixture(scope="module")
def two(pool, on_three) -> dict:
    return pool.run(_on_two_ranks, 2, on_three[0], timeout=400)[0]


def _equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_generators_go_on_at_the_same_layout(two):
    assert two["generators"]["restored"] and two["generators"]["equal"]


def test_generators_start_anew_at_another_layout_and_that_is_told(two):
    generators = two["generators"]
    assert generators["restored elsewhere"] is False and generators["restored on another device"] is False
    (first, again), (other, _) = generators["anew"]
    assert first == again, "a function of seed, step and rank"
    assert first != generators["expected"]
    python, numpy, torch_cpu, tracked = (a != b for a, b in zip(first, other, strict=True))
    # On a CPU torch's own generator is Megatron's, which agrees between tensor-parallel ranks; the tracked one differs.
    assert (python, numpy, torch_cpu, tracked) == (True, True, False, True)


def test_a_save_holds_the_state_at_its_start_whatever_is_trained_meanwhile(two):
    background = two["background"]
    for expected, loaded in zip(background["expected"], background["loaded"], strict=True):
        assert _equal(loaded, expected)
    assert not _equal(*background["expected"])


def test_a_save_is_published_once_all_ranks_have_written(two):
    files = [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert two["background"]["published"] == [files, files]
    assert two["background"]["on disk"] == [sorted([*files, "common.pt", "metadata.json"])] * 2
    waited_s, total_s, nbytes = two["background"]["report"]
    assert 0 < waited_s < total_s and nbytes > 0
    assert two["background"]["idle"] == (None, None)


def test_weights_come_alone_from_milestones_and_from_whole_states(two):
    weights = two["weights"]
    assert all(_equal(weights[name], weights["expected"]) for name in ("full", "weights", "alone"))
    full, alone = weights["sizes"]
    assert alone < full / 4


@pytest.mark.parametrize("case", [CASE, replace(CASE, stage=3), replace(CASE, tensor=2)], ids=["zero1", "zero3", "tp2"])
def test_an_engine_starts_from_weights_with_a_fresh_optimizer(two, case):
    found, states, step, loss = two["weights"]["engines"][case]
    expected = two["weights"]["expected"]
    assert _equal(found, expected) and step == 0
    assert _equal(states["fp32"], {name: weight.float() for name, weight in expected.items()})
    assert not any(tensor.any() for kind in ("exp_avg", "exp_avg_sq") for tensor in states[kind].values())
    assert loss == pytest.approx(two["weights"]["evaluated"], abs=4e-3 if case.tensor > 1 else 0)


def test_a_failure_names_rank_and_cause_on_every_rank(two):
    for text in two["failure"]["told"]:
        assert "blocked was not written: rank 1: IsADirectoryError" in text and "rank 0" not in text
    assert "rank 0: ZeroDivisionError" in two["failure"]["unpublished"]
    assert two["failure"]["good"].endswith("free was completed") and two["failure"]["nothing"] is None


def test_another_model_and_an_empty_directory_are_refused_in_words(two):
    refused = two["refused"]
    assert "sub_norm.weight is not in" in refused["subln"]
    assert (
        "linear_qkv.weight has the shape [2, 192, 64] in" in refused["one_kv_head"]
        and "[2, 96, 64] in this model" in refused["one_kv_head"]
    )
    assert "holds no state" in refused["dense"]


def test_megatrons_own_loader_reads_it(two):
    tensors = two["megatron"]["tensors"]
    for kind, prefix in (("weights", ""), ("exp_avg", "optimizer.exp_avg.")):
        expected = two["megatron"][kind]
        for name in ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight", "self_attention.linear_qkv.weight", "input_layernorm.weight"):
            layers = torch.stack([expected[f"decoder.layers.{i}.{name}"] for i in range(VARIANTS["dense"][0].num_layers)])
            assert torch.equal(tensors[f"{prefix}decoder.layers.{name}"], layers), name
        assert torch.equal(tensors[f"{prefix}output_layer.weight"], expected["output_layer.weight"])


def test_the_format_before_is_still_read(two):
    older = two["older"]
    assert _equal(older["loaded"], older["expected"]) and older["step"] == 1 and older["restored"] is False


@pytest.mark.parametrize("case", RAGGED, ids=lambda case: f"zero{case.stage}")
@pytest.mark.parametrize("stage", [1, 3])
def test_three_ranks_save_what_two_load(two, on_three, case, stage):
    expected, found = on_three[1][case], two["from three"][case, stage]
    assert _equal(found["weights"], expected["weights"]) and _equal(found["exp_avg"], expected["exp_avg"])
