"""A saved state continues bit for bit at its own layout, and is the same weights, moments and step at any other.

Two or four ranks save, and two or four load.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.parallel.helpers import VARIANTS, gather, layout
from tests.parallel.training import Case, case_layout, make_engine, take_step


@dataclass(frozen=True)
class Run:
    case: Case
    ranks: int


def two(case: Case, **changes) -> Run:
    return Run(replace(case, **changes), 2)


def four(case: Case, **changes) -> Run:
    return Run(replace(case, **changes), 4)


DENSE, DENSE_BF16, DEEP = Case(), Case(precision="bf16"), Case("groups", layers=4)
QUANTIZED, QUANTIZED_BF16 = Case("bitnet_groups_subln"), Case("bitnet_groups_subln", "bf16")
TIED, TIED_BF16 = Case("tied_bitnet_subln"), Case("tied_bitnet_subln", "bf16")
ONE_KV_HEAD = Case("one_kv_head", "bf16")
MOE, MOE_QUANTIZED, MOE_BF16 = Case("moe"), Case("moe_bitnet_groups_subln"), Case("moe_bitnet_groups_subln", "bf16")
MOE_TIED, MOE_TIED_BF16 = Case("moe_tied"), Case("moe_tied", "bf16")
SP = {"tensor": 2, "sequence": True}
LAYOUT = ("tensor", "sequence", "pipeline", "expert", "stage")

SAVED: dict[str, list[Run]] = {
    "dense fp32": [two(DENSE), two(DENSE), two(DENSE, pipeline=2), two(DENSE, stage=2), two(DENSE, stage=3)],
    "dense bf16": [two(DENSE_BF16), two(DENSE_BF16), two(DENSE_BF16, stage=2), two(DENSE_BF16, stage=3), four(DENSE_BF16, stage=3)],
    "dense bf16 stage 2": [two(DENSE_BF16, stage=2), two(DENSE_BF16), two(DENSE_BF16, stage=3)],
    "dense fp32 stage 3": [two(DENSE, stage=3), two(DENSE, stage=3), two(DENSE, stage=2), four(DENSE, **SP, pipeline=2)],
    "quantized bf16 stage 3": [
        two(QUANTIZED_BF16, stage=3), two(QUANTIZED_BF16, stage=3), two(QUANTIZED_BF16), two(QUANTIZED_BF16, stage=2),
        two(QUANTIZED_BF16, tensor=2),
    ],
    "tied bf16 stage 3": [two(TIED_BF16, stage=3), two(TIED_BF16, stage=3), two(TIED_BF16), two(TIED_BF16, pipeline=2)],
    "tied fp32 tensor stage 3": [two(TIED, tensor=2, stage=3), two(TIED, stage=3), two(TIED, pipeline=2)],
    "quantized fp32 stage 2": [two(QUANTIZED, stage=2), two(QUANTIZED, stage=2), two(QUANTIZED, tensor=2)],
    "quantized bf16": [two(QUANTIZED_BF16), two(QUANTIZED_BF16), two(QUANTIZED_BF16, pipeline=2)],
    "tied bf16 pipeline": [two(TIED_BF16, pipeline=2), two(TIED_BF16, pipeline=2), two(TIED_BF16), two(TIED_BF16, stage=3)],
    "tied fp32 pipeline": [two(TIED, pipeline=2), two(TIED), two(TIED, **SP)],
    "quantized fp32 tensor": [two(QUANTIZED, **SP), two(QUANTIZED)],
    "tied bf16 tensor": [two(TIED_BF16, tensor=2), two(TIED_BF16)],
    "one kv head bf16 stage 2": [two(ONE_KV_HEAD, stage=2), two(ONE_KV_HEAD, tensor=2), four(ONE_KV_HEAD, tensor=4)],
    "tensor and pipeline": [
        four(QUANTIZED_BF16, **SP, pipeline=2, stage=2), four(QUANTIZED_BF16, **SP, pipeline=2, stage=2), four(QUANTIZED_BF16, tensor=4),
        two(QUANTIZED_BF16, stage=3), two(QUANTIZED_BF16, pipeline=2),
    ],
    "deep pipeline": [four(DEEP, pipeline=4), four(DEEP, pipeline=4), four(DEEP, stage=3), two(DEEP, tensor=2), two(DEEP, stage=2)],
    "deep stage 3": [four(DEEP, stage=3), four(DEEP, stage=3), four(DEEP, pipeline=4), four(DEEP, tensor=4), two(DEEP, stage=3)],
    "tied on four": [four(TIED, pipeline=2), four(TIED, **SP, pipeline=2), four(TIED, stage=3), two(TIED, pipeline=2)],
    "experts together": [
        two(MOE_QUANTIZED, stage=2), two(MOE_QUANTIZED, stage=2), two(MOE_QUANTIZED, expert=2), two(MOE_QUANTIZED, pipeline=2),
        two(MOE_QUANTIZED, **SP), four(MOE_QUANTIZED, **SP, expert=2, stage=2),
    ],
    "tensor stage 3": [
        four(QUANTIZED, **SP, stage=3), four(QUANTIZED, **SP, stage=3), four(QUANTIZED, **SP, pipeline=2), two(QUANTIZED, stage=3),
    ],
    "tied bf16 tensor stage 3 on four": [four(TIED_BF16, **SP, stage=3), four(TIED_BF16, **SP, stage=3), two(TIED_BF16, **SP)],
    "experts twice": [four(MOE, expert=2), four(MOE, expert=2), four(MOE, stage=2), two(MOE, expert=2, stage=2)],
    "experts twice stage 2": [
        four(MOE_TIED_BF16, expert=2, stage=2), four(MOE_TIED_BF16, expert=2, stage=2), four(MOE_TIED_BF16, expert=2, pipeline=2),
        two(MOE_TIED_BF16),
    ],
    "experts apart": [
        two(MOE_BF16, expert=2), two(MOE_BF16, expert=2), two(MOE_BF16), two(MOE_BF16, expert=2, stage=2), two(MOE_BF16, pipeline=2),
    ],
    "experts apart stage 2": [
        two(MOE, expert=2, stage=2), two(MOE, expert=2, stage=2), two(MOE), two(MOE, **SP), two(MOE, pipeline=2), four(MOE, expert=4),
    ],
    "experts and tensor": [
        four(MOE_QUANTIZED, **SP, expert=2, stage=2), four(MOE_QUANTIZED, **SP, expert=2, stage=2),
        four(MOE_QUANTIZED, expert=2, pipeline=2), four(MOE_QUANTIZED, expert=4), two(MOE_QUANTIZED, expert=2), two(MOE_QUANTIZED),
    ],
    "experts and pipeline": [
        four(MOE_TIED_BF16, expert=2, pipeline=2), four(MOE_TIED_BF16, expert=2, pipeline=2), four(MOE_TIED_BF16, **SP, expert=2),
        four(MOE_TIED_BF16, expert=2, stage=2), two(MOE_TIED_BF16, pipeline=2), two(MOE_TIED_BF16, stage=2),
    ],
    "experts stage 3": [
        two(MOE_QUANTIZED, stage=3), two(MOE_QUANTIZED, stage=3), two(MOE_QUANTIZED, expert=2), four(MOE_QUANTIZED, expert=2, stage=2),
    ],
    "experts stage 2 to 3": [two(MOE_TIED_BF16, expert=2, stage=2), two(MOE_TIED_BF16, stage=3)],
    "tied experts": [two(MOE_TIED, expert=2), two(MOE_TIED, pipeline=2), two(MOE_TIED, **SP), four(MOE_TIED, expert=4, stage=2)],
}  # fmt: skip
"""The run that saves, and those that load what it saved."""
SENT = [
    "dense fp32 stage 3",
    "tied bf16 stage 3",
    "deep stage 3",
    "tensor stage 3",
    "tied bf16 tensor stage 3 on four",
    "experts twice",
    "experts twice stage 2",
]
"""Those where no rank holds all that it writes: others send it their shares."""
MORE = (
    "dense bf16 stage 2", "quantized fp32 stage 2", "quantized fp32 tensor", "tied fp32 tensor stage 3", "tied fp32 pipeline",
    "tied bf16 tensor", "tied on four", "deep pipeline", "experts together", "experts twice", "experts stage 2 to 3", "experts apart",
    "tied experts",
)  # fmt: skip
"""Those of `make test-all`."""
LOADS = [(name, index) for name, (_, *targets) in SAVED.items() for index in range(len(targets))]


def _state(engine) -> dict[str, dict[str, torch.Tensor] | int]:
    """Whole working weights, masters, moments, and the number of updates."""
    from megatron_qsparse.compat import deepspeed
    from megatron_qsparse.parallel.checkpoint.adam import adam_step

    utils = deepspeed.load().utils
    if engine.stage < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return {
        "weights": gather(engine.model),
        "fp32": gather(engine.model, lambda param: utils.safe_get_full_fp32_param(param).view(param.shape)),
        "exp_avg": gather(engine.model, lambda param: utils.safe_get_full_optimizer_state(param, "exp_avg").view(param.shape)),
        "exp_avg_sq": gather(engine.model, lambda param: utils.safe_get_full_optimizer_state(param, "exp_avg_sq").view(param.shape)),
        "step": adam_step(engine),
    }


def _forget(engine) -> None:
    """Another network altogether: what is equal after loading was loaded."""
    with torch.no_grad():
        for param in engine.model.parameters():
            (param.ds_tensor if engine.stage == 3 else param.data).add_(1.0)
    engine.weights_changed()


def _on(rank: int, root: Path, ranks: int, names: list[str]) -> dict[str, dict]:
    """What is saved by so many ranks."""
    return {name: _train_and_save(SAVED[name][0].case, root / name) for name in names if SAVED[name][0].ranks == ranks}


def _elsewhere(rank: int, root: Path, ranks: int, names: list[str]) -> dict[tuple[str, int], dict]:
    """What is loaded by so many ranks."""
    return {
        (name, index): _load(target.case, root / name, steps=3 if target == SAVED[name][0] else 1)
        for name, index in LOADS if name in names and (target := SAVED[name][1 + index]).ranks == ranks
    }  # fmt: skip


def _save(engine, directory: Path) -> None:
    from megatron_qsparse.parallel import checkpoint

    directory.mkdir(exist_ok=True)
    torch.distributed.barrier()
    checkpoint.save(engine, directory)


def _train_and_save(case: Case, directory: Path) -> dict:
    """The state after two steps, how many tensors rank 0 has a share of, and the three steps after it."""
    from megatron_qsparse.parallel.checkpoint.snapshot import Copier

    with case_layout(case) as parallel:
        engine = make_engine(case, parallel)
        for step in range(2):
            take_step(engine, step)
        state = _state(engine)
        shares = len(Copier(engine).snapshot(optimizer=True).shares)
        _save(engine, directory)
        return {"state": state, "shares": shares, "steps": [take_step(engine, step) for step in range(2, 5)]}


def _load(case: Case, directory: Path, steps: int) -> dict:
    from megatron_qsparse.parallel import checkpoint

    with case_layout(case) as parallel:
        engine = make_engine(case, parallel)
        _forget(engine)
        checkpoint.load(engine, directory)
        return {"state": _state(engine), "steps": [take_step(engine, step) for step in range(2, 2 + steps)]}


def _newer(rank: int, directory: Path) -> str:
    from megatron_qsparse.parallel import checkpoint
    from megatron_qsparse.parallel.checkpoint import snapshot

    with layout() as parallel, pytest.MonkeyPatch.context() as patch:
        engine = make_engine(Case(), parallel)
        patch.setattr(snapshot, "FORMAT_VERSION", 99)
        # A later format may hold other tensors: it must be refused before they are looked for.
        patch.setattr(snapshot, "STATES", ("fp32", "exp_avg"))
        _save(engine, directory)
        patch.undo()
        with pytest.raises(ValueError) as caught:
            checkpoint.load(engine, directory)
    return str(caught.value)


class _Results:
    """Of the runs of `make test` once one of them is asked for, and of those of `make test-all` likewise."""

    def __init__(self, pool, root: Path):
        self._pool, self._root = pool, root
        self._saved: dict[str, dict] = {}
        self._loaded: dict[tuple[str, int], dict] = {}

    def saved(self, name: str) -> dict:
        if name not in self._saved:
            self._run([other for other in SAVED if (other in MORE) == (name in MORE)])
        return self._saved[name]

    def loaded(self, entry: tuple[str, int]) -> dict:
        self.saved(entry[0])
        return self._loaded[entry]

    def _run(self, names: list[str]) -> None:
        for function, found in ((_on, self._saved), (_elsewhere, self._loaded)):
            for ranks in (2, 4):
                found |= self._pool.run(function, ranks, self._root, ranks, names, timeout=300)[0]


@pytest.fixture(scope="module")
def results(pool, tmp_path_factory) -> _Results:
    return _Results(pool, tmp_path_factory.mktemp("checkpoints"))


def _assert_equal_state(found: dict, expected: dict, tied: bool) -> None:
    assert found["step"] == expected["step"] == 2
    for kind in ("weights", "fp32", "exp_avg", "exp_avg_sq"):
        for name in expected[kind].keys() & found[kind].keys():
            assert torch.equal(found[kind][name], expected[kind][name]), (kind, name)
        # Two pipeline stages hold a second copy of a tied embedding.
        assert expected[kind].keys() ^ found[kind].keys() <= ({"output_layer.weight"} if tied else set())
        assert all(tensor.any() for tensor in expected[kind].values())


def _marked(entries: list[tuple[str, int]]) -> list:
    return [pytest.param(entry, id=_label(entry), marks=[pytest.mark.matrix] * (entry[0] in MORE)) for entry in entries]


def _label(entry: tuple[str, int]) -> str:
    name, index = entry
    target = SAVED[name][1 + index]
    changed = [f"{field}={value}" for field in LAYOUT if (value := getattr(target.case, field)) != getattr(Case(), field)]
    return f"{name}: {target.ranks} ranks {' '.join(changed)}".rstrip()


@pytest.mark.parametrize("entry", _marked(LOADS))
def test_every_layout_gets_the_same_weights_masters_moments_and_step(results, entry):
    name, _ = entry
    tied = VARIANTS[SAVED[name][0].case.variant][0].tied_embeddings
    _assert_equal_state(results.loaded(entry)["state"], results.saved(name)["state"], tied)


@pytest.mark.parametrize("entry", _marked([(name, index) for name, index in LOADS if SAVED[name][0] == SAVED[name][1 + index]]))
def test_the_next_steps_at_the_same_layout_keep_every_bit(results, entry):
    run, load = results.saved(entry[0]), results.loaded(entry)
    assert run["state"]["weights"].keys() == load["state"]["weights"].keys()
    assert load["steps"] == run["steps"] and len(load["steps"]) == 3
    assert all(step.applied for step in load["steps"])


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.matrix] * (name in MORE)) for name in SENT])
def test_shares_were_put_together(results, name):
    assert results.saved(name)["shares"] > 0


def _comparable(source: Case, target: Case) -> bool:
    """With another number of tensor-parallel ranks partial sums round differently, and quantized codes near a tie flip, which
    test_invariance.py takes into account."""
    return source.tensor == target.tensor or (source.precision == "fp32" and source.variant in ("dense", "groups", "moe"))


@pytest.mark.parametrize(
    "entry", _marked([(name, index) for name, index in LOADS if _comparable(SAVED[name][0].case, SAVED[name][1 + index].case)])
)
def test_the_next_step_is_the_same_at_every_layout(results, entry):
    name, index = entry
    expected, found = results.saved(name)["steps"][0], results.loaded(entry)["steps"][0]
    assert found.loss == pytest.approx(expected.loss, abs=2e-6)
    source, target = SAVED[name][0].case, SAVED[name][1 + index].case
    # One process rounds the sum of a tied embedding's two gradients to bf16, two stages round each of them. An expert rounds
    # the gradients of those samples together that its expert-parallel ranks see together.
    tied = "tied" in source.variant and source.pipeline != target.pipeline
    rounded_otherwise = source.precision == "bf16" and (tied or source.expert != target.expert)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4 if rounded_otherwise else 1e-6)


def test_a_newer_format_is_refused_in_words(pool, tmp_path):
    told = pool.run(_newer, 2, tmp_path / "newer")[0]
    assert "format 99" in told and "newer" in told
