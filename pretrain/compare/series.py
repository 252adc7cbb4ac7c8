"""Curves ready to draw: losses against tokens and against activated FLOPs, thinned to what a picture can show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy

from pretrain.compare.load import TRAIN_LOSS, VALIDATION_LOSS, Run

AXES = {"tokens": ("train/tokens", "tokens"), "flops": ("train/activated_flops", "activated FLOPs")}
MAX_TRAIN_POINTS = 120


@dataclass(frozen=True)
class Series:
    """One run against one horizontal axis. Same length within each pair of lists."""

    train_x: list[float]
    train_loss: list[float]
    validation_x: list[float]
    validation_loss: list[float]
    gap: list[float]
    """Validation loss minus the baseline's at the same step; NaN where the baseline has none."""


def make_series(run: Run, baseline: Run | None, axis: str) -> Series | None:
    """The curves of `run` against "tokens" or "flops"; None when the run has no such metric."""
    scale = run.history.get(AXES[axis][0])
    if scale is None:
        return None

    def position(steps: list[int]) -> numpy.ndarray:
        # The scale is logged with the training loss; a validation before the first step lies at zero.
        return numpy.interp(
            steps, [0, *scale.steps] if scale.steps[0] > 0 else scale.steps, [0, *scale.values] if scale.steps[0] > 0 else scale.values
        )

    train = run.history[TRAIN_LOSS]
    train_x, train_loss = bucket_means(position(train.steps), numpy.asarray(train.values, dtype=float))
    validation = run.history.get(VALIDATION_LOSS)
    if validation is None:
        return Series(train_x, train_loss, [], [], [])
    reference = baseline.history.get(VALIDATION_LOSS) if baseline else None
    known = dict(zip(reference.steps, reference.values, strict=True)) if reference else {}
    gap = [value - known.get(step, math.nan) for step, value in zip(validation.steps, validation.values, strict=True)]
    return Series(train_x, train_loss, position(validation.steps).tolist(), list(validation.values), gap)


def gap_points(run: Run, baseline: Run) -> list[tuple[int, float]]:
    """(step, validation loss minus the baseline's) at the steps that both have, the untrained start left out."""
    curve, reference = run.history.get(VALIDATION_LOSS), baseline.history.get(VALIDATION_LOSS)
    if run is baseline or curve is None or reference is None:
        return []
    known = dict(zip(reference.steps, reference.values, strict=True))
    pairs = [(step, value - known[step]) for step, value in zip(curve.steps, curve.values, strict=True) if step > 0 and step in known]
    return [(step, gap) for step, gap in pairs if math.isfinite(gap)]


def bucket_means(x: numpy.ndarray, y: numpy.ndarray) -> tuple[list[float], list[float]]:
    """Means of consecutive groups, so that at most MAX_TRAIN_POINTS points remain; short curves stay as they are."""
    size = points_per_mean(len(x))
    starts = range(0, len(x), size)
    return [float(x[at : at + size].mean()) for at in starts], [float(y[at : at + size].mean()) for at in starts]


def points_per_mean(points: int) -> int:
    """How many logged points one drawn point of the training curve averages."""
    return max(1, math.ceil(points / MAX_TRAIN_POINTS))


def loss_range(series: list[Series], entropy: float | None) -> tuple[float, float]:
    """Lower and upper end of the loss axis: the first tenth of training may leave at the top, the rest fits."""
    finite = [value for item in series for value in [*item.train_loss, *item.validation_loss] if math.isfinite(value)]
    late = []
    start = 0.1 * max(item.train_x[-1] for item in series)
    for item in series:
        points = [*zip(item.train_x, item.train_loss, strict=True), *zip(item.validation_x, item.validation_loss, strict=True)]
        late += [value for x, value in points if x >= start and math.isfinite(value)]
    if not late:
        return 0.0, 1.0
    low, high = min(finite), max(late)
    if entropy is not None and high < entropy < high + 2 * (high - low):
        high = entropy
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin
