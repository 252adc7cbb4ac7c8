"""Reads the runs of one MLflow experiment, with the histories of all their metrics.

A resumed run can hold two points for one step (the step was trained again with another result): the one with the newest
timestamp counts. Of several runs with one name the newest FINISHED one counts. What is left out is said in a note.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from pretrain.tracking.store import connect, resolve_uri, shipping_errors, sqlite_path, validate_uri

# MLflow stores infinity as the largest float64.
LARGEST_STORED = 1.7976e308
TRAIN_LOSS = "train/loss"
VALIDATION_LOSS = "val/loss"


class ComparisonError(Exception):
    """The comparison cannot be made; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Curve:
    """The history of one metric: steps ascending, one value each."""

    steps: list[int]
    values: list[float]


@dataclass
class Run:
    """One run as MLflow holds it, or will."""

    name: str
    run_id: str
    status: str
    started_ms: int
    params: dict[str, str]
    tags: dict[str, str]
    history: dict[str, Curve] = field(default_factory=dict)
    directory: str = ""
    """Where it was read; "" means from MLflow."""
    tracked: bool = True
    """Whether the MLflow store of this comparison has it."""

    def last(self, metric: str) -> float | None:
        """The value at the highest step, None without points."""
        curve = self.history.get(metric)
        return curve.values[-1] if curve else None


@dataclass
class Selection:
    """The runs that take part and remarks about those that do not."""

    uri: str
    """"" where nothing is read from MLflow."""
    experiment: str
    experiment_id: str
    runs: list[Run]
    notes: list[str]


def load_runs(uri: str, experiment: str, names: list[str] | None = None) -> Selection:
    """The runs to compare, in the order of `names`, else of their start.

    Args:
        uri: tracking URI; "" means the default one.
        experiment: name of the MLflow experiment.
        names: run names to take; all when None.

    Raises:
        ComparisonError: no store, no such experiment, no such run, or no run with points.
    """
    uri = resolve_uri(uri)
    if problem := validate_uri(uri):
        raise ComparisonError(problem.replace("tracking.uri", "--uri"))
    database = sqlite_path(uri)
    if database and not database.exists():
        raise ComparisonError(f"there is no MLflow database {database}: train first, or name the right one with --uri")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    errors = shipping_errors()
    try:
        return _load(uri, experiment, names)
    except errors as error:
        raise ComparisonError(f"cannot read MLflow at {uri}: {' '.join(str(error).split())[:300]}") from error


def _load(uri: str, experiment: str, names: list[str] | None) -> Selection:
    client = connect(uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        known = ", ".join(sorted(item.name for item in client.search_experiments() if item.name != "Default"))
        raise ComparisonError(f"there is no experiment {experiment!r} at {uri}; it has {known or 'none yet'}")
    candidates: dict[str, list] = {}
    token = None
    while True:
        page = client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"], page_token=token)
        for run in page:
            candidates.setdefault(run.info.run_name, []).append(run)
        token = page.token
        if not token:
            break
    if not candidates:
        raise ComparisonError(f"experiment {experiment!r} at {uri} has no runs yet: train first")
    if missing := [name for name in names or [] if name not in candidates]:
        raise ComparisonError(f"experiment {experiment!r} has no run named {', '.join(missing)}; it has {', '.join(candidates)}")

    runs, notes = [], []
    for name in names or candidates:
        finished = [run for run in candidates[name] if run.info.status == "FINISHED"]
        if not finished:
            newest = candidates[name][-1].info
            notes.append(f"{name} is left out: none of its runs has finished (the newest is {newest.status})")
            continue
        chosen = finished[-1]
        if others := len(candidates[name]) - 1:
            plural = "runs" if others > 1 else "run"
            notes.append(f"{name}: the newest finished run {chosen.info.run_id} is shown, {others} other {plural} of that name not")
        run = Run(
            name=name,
            run_id=chosen.info.run_id,
            status=chosen.info.status,
            started_ms=chosen.info.start_time,
            params=dict(sorted(chosen.data.params.items())),
            tags={key: value for key, value in sorted(chosen.data.tags.items()) if not key.startswith("mlflow.")},
        )
        run.history = {key: newest_per_step(client.get_metric_history(run.run_id, key)) for key in sorted(chosen.data.metrics)}
        if not without_losses(run, "MLflow has none (python -m pretrain.tracking sync RUN_DIR ships a journal)", notes):
            runs.append(run)
    if not runs:
        raise ComparisonError(f"experiment {experiment!r} has nothing to compare: " + "; ".join(notes))
    return Selection(uri, experiment, found.experiment_id, runs, notes)


def without_losses(run: Run, reason: str, notes: list[str]) -> bool:
    """Whether a run cannot take part for want of training losses; notes that, and where it lacks validation losses."""
    if TRAIN_LOSS not in run.history:
        notes.append(f"{run.name} is left out for want of {TRAIN_LOSS}: {reason}")
        return True
    if VALIDATION_LOSS not in run.history:
        notes.append(f"{run.name} has no {VALIDATION_LOSS}: it takes no part in what compares validation losses")
    return False


def newest_per_step(points: list) -> Curve:
    """One value a step from MLflow's metric entities: the newest timestamp wins, of equal ones the later in the list."""
    chosen: dict[int, tuple[int, float]] = {}
    for point in points:
        if point.step not in chosen or point.timestamp >= chosen[point.step][0]:
            chosen[point.step] = (point.timestamp, _from_store(point.value))
    steps = sorted(chosen)
    return Curve(steps, [chosen[step][1] for step in steps])


def _from_store(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) > LARGEST_STORED else value
