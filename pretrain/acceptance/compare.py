"""How far a run is from its reference, and how far it may be."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pretrain.acceptance.cases import LAST, LONG, Case

EQUAL = {
    "loss, nat": 2e-6, "gradient norm, relative": 1e-5, "gradients, of the largest of each": 1e-5, "weights, of the largest of each": 1e-5,
}  # fmt: skip
"""As in tests/parallel: the same sums in another order. In fp32, and in bf16 where no partial sum is rounded before it is added."""
ROUNDED = {"loss, nat": 5e-3, "gradient norm, relative": 2e-3, "gradients, one minus the cosine": 5e-4}
"""Tensor-parallel ranks in bf16 round their partial sums before they add them, one process the sum. Measured on CPUs: 2e-3, 1.2e-3 and
2.5e-4 at most (tests/parallel/test_bf16_tensor.py)."""
TIPPED = {"loss, nat": 2e-4, "gradient norm, relative": 1e-3, "gradients, one minus the cosine": 5e-4}
"""Where matrices are divided, another order of sums tips some int8 and ternary roundings, and what follows. Ten times what CPUs have."""
LIMITS = {"equal": EQUAL, "rounded": ROUNDED, "tipped": TIPPED}
FLIPPED = {"loss, nat": 3e-2, "gradient norm, relative": 3e-2, "gradients, one minus the cosine": 3e-2}
"""One entry of masks, codes or routes in 10^6 may be so near to its neighbour that the order of a sum decides, and what follows moves;
that is the numbers' doing and not the layout's, if the next step fits. Measured on CPUs: one of 18 steps, loss off by 3.8e-3, norm by
1.1e-2, cosine by 2.4e-3. The mistakes of tests/parallel/faults.py do not go away in the next step."""
RESHARDED = {"loss of each step, nat": 1e-5, "moments, of the largest of each": 1e-5, "weights, of the largest of each": 1e-5}
"""Over up to three steps without BitNet: Adam's state and the fp32 weights are those after the last one."""


@dataclass(frozen=True)
class Figure:
    """One measured difference."""

    what: str
    value: float
    limit: float

    @property
    def fits(self) -> bool:
        # NaN fits nowhere.
        return self.value <= self.limit


def compare(case: Case, folder: Path) -> list[Figure]:
    """Raises ValueError or OSError where a run has not come to its end, or its files cannot be read."""
    if case.kind in ("reference", "unbroken", "killed"):
        return []
    here, there = folder / "runs" / case.run, folder / "runs" / case.reference
    if case.kind == "continued":
        return _exact(here, there)
    if case.kind == "reshard":
        return _several_steps(here, there, range(case.begins[1] + 1, LAST + 1))
    return _one_step(here, there, case.begins[1], LIMITS[case.near])


def may_have_flipped(case: Case, folder: Path) -> bool:
    """Whether a layout that does not fit is no farther from its reference than an entry that tips over explains. Raises as `compare`."""
    if case.kind != "layout" or case.variant == "dense":
        return False
    return all(figure.fits for figure in _one_step(folder / "runs" / case.run, folder / "runs" / case.reference, case.begins[1], FLIPPED))


def losses(run: Path, name: str) -> dict[int, float]:
    """Of each step in the journal. Raises ValueError where the last one is missing, OSError without a journal."""
    from pretrain.tracking import read_journal

    found = {row["step"]: row[name] for row in read_journal(run / "metrics.jsonl") if name in row}
    if max(found, default=0) not in (LAST, LONG):
        raise ValueError(f"{run.name} ended at step {max(found, default=0)}")
    return found


def _one_step(here: Path, there: Path, begin: int, limits: dict[str, float]) -> list[Figure]:
    """Of the step behind `begin`."""
    from pretrain.checkpoint.tensors import read_tensors

    def step(run: Path, number: int) -> dict:
        return read_tensors(run / "checkpoints" / f"step_{number:08d}")

    def journaled(name: str) -> tuple[float, float]:
        return losses(here, name)[begin + 1], losses(there, name)[begin + 1]

    loss, norm = journaled("train/loss"), journaled("train/grad_norm")
    own, expected, before = step(here, begin + 1), step(there, begin + 1), step(there, begin)
    gradients = _gradients(own, before), _gradients(expected, before)
    measures: dict[str, Callable[[], float]] = {
        "loss, nat": lambda: abs(loss[0] - loss[1]),
        "gradient norm, relative": lambda: abs(norm[0] / norm[1] - 1),
        "gradients, of the largest of each": lambda: _farthest(*gradients),
        "gradients, one minus the cosine": lambda: _angle(*gradients),
        "weights, of the largest of each": lambda: _farthest(_named(own, "optimizer.fp32."), _named(expected, "optimizer.fp32.")),
    }
    return [Figure(what, measures[what](), limit) for what, limit in limits.items()]


def _several_steps(here: Path, there: Path, steps: range) -> list[Figure]:
    from pretrain.checkpoint.tensors import read_tensors

    own, expected = losses(here, "train/loss"), losses(there, "train/loss")
    mine, theirs = (read_tensors(run / "checkpoints" / f"step_{LAST:08d}") for run in (here, there))

    def state(prefix: str) -> float:
        return _farthest(_named(mine, prefix), _named(theirs, prefix))

    values = (
        _largest(abs(own[step] - expected[step]) for step in steps),
        _largest([state("optimizer.exp_avg."), state("optimizer.exp_avg_sq.")]),
        state("optimizer.fp32."),
    )
    return [Figure(what, value, limit) for (what, limit), value in zip(RESHARDED.items(), values, strict=True)]


def _largest(values: Iterable[float]) -> float:
    """NaN where one is: Python's max leaves those out that are not the first."""
    values = list(values)
    return next((value for value in values if math.isnan(value)), max(values))


def _named(state: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): tensor.double() for name, tensor in state.items() if name.startswith(prefix)}


def _gradients(state: dict, before: dict) -> dict:
    """What Adam's first moment took in, up to the factor 1 - beta1 = 0.1, clipped as training clips."""
    moments, earlier = _named(state, "optimizer.exp_avg."), _named(before, "optimizer.exp_avg.")
    return {name: moments[name] - 0.9 * earlier[name] for name in moments}


def _farthest(own: dict, expected: dict) -> float:
    if own.keys() != expected.keys():
        raise ValueError(f"other tensors than in the reference: {sorted(own.keys() ^ expected.keys())[:3]}")
    return _largest(float((own[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)) for name, value in expected.items())


def _angle(own: dict, expected: dict) -> float:
    import torch

    cosine = torch.nn.functional.cosine_similarity
    return _largest(1 - float(cosine(own[name].flatten(), value.flatten(), dim=0)) for name, value in expected.items())


def _exact(here: Path, there: Path) -> list[Figure]:
    import torch

    from pretrain.checkpoint.tensors import read_tensors

    own, expected = losses(here, "train/loss"), losses(there, "train/loss")
    differ = [step for step in own.keys() | expected.keys() if own.get(step) != expected.get(step)]
    mine, theirs = (read_tensors(run / "checkpoints" / f"step_{LONG:08d}") for run in (here, there))
    both = mine.keys() & theirs.keys()
    unequal = [*(mine.keys() ^ theirs.keys()), *(name for name in both if not torch.equal(mine[name], theirs[name]))]
    return [Figure("losses that differ", len(differ), 0), Figure("tensors that differ", len(unequal), 0)]
