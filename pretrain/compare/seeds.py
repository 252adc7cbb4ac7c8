"""How much the seed alone moves the validation loss, measured on runs that differ in nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pretrain.compare.load import VALIDATION_LOSS, Run
from pretrain.compare.table import is_place

SEED = "train.seed"
QUICKSTART = "quickstart"


@dataclass(frozen=True)
class SeedGroup:
    """Runs of one setting with different seeds."""

    names: list[str]
    losses: list[float]
    """Last validation loss of each, nat per token."""

    @property
    def spread(self) -> float:
        """Largest difference between two of them, nat per token."""
        return max(self.losses) - min(self.losses)


def measure_seeds(runs: list[Run]) -> list[SeedGroup]:
    """The groups of at least two seeds whose runs agree in all other settings and were validated last at the same step."""
    groups: dict[tuple, dict[str, Run]] = {}
    for run in runs:
        curve = run.history.get(VALIDATION_LOSS)
        if curve is None or SEED not in run.params or not math.isfinite(curve.values[-1]):
            continue
        setting = tuple(sorted((name, value) for name, value in run.params.items() if name != SEED and not is_place(name)))
        groups.setdefault((setting, curve.steps[-1]), {}).setdefault(run.params[SEED], run)
    found = [list(group.values()) for group in groups.values() if len(group) > 1]
    return [SeedGroup([run.name for run in group], [run.last(VALIDATION_LOSS) for run in group]) for group in found]


def largest_spread(groups: list[SeedGroup]) -> float | None:
    """The largest measured spread, nat per token; None when no setting was trained with two seeds."""
    return max((group.spread for group in groups), default=None)


def seed_sentence(groups: list[SeedGroup], experiment: str) -> str:
    """What is known about the seeds of these runs, or how to learn it."""
    if groups:
        measured = "; ".join(f"{', '.join(group.names)} by {group.spread:.3f} nat" for group in groups)
        return f"Runs that differ in the seed alone differ in validation loss: {measured}."
    experience = " Experience with the quickstart: a few hundredths of a nat at this size." if experiment == QUICKSTART else ""
    return (
        "No setting here was trained with two seeds: train a run X again with --train.seed 1 --tracking.run_name X_seed1 "
        f"and an --output_dir of its own to see the spread.{experience}"
    )
