"""Reads runs from their directories: run.json and the journals, as MLflow would hold them once they are shipped.

A step that was logged twice counts with its later line, a damaged line is left out and noted, and so is what is only in the journal
because MLflow is not given it. MLflow itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.compare.load import ComparisonError, Curve, Run, Selection, without_losses
from pretrain.tracking.entities import metric_name
from pretrain.tracking.journal import JOURNAL_ONLY, RESERVED_KEYS, decode_line, iterate_lines
from pretrain.tracking.record import RECORD_NAME, RunRecord
from pretrain.tracking.shipper import RUN_ID_NAME
from pretrain.tracking.state import METRICS_NAME, SYSTEM_NAME


def load_directories(directories: Sequence[Path]) -> Selection:
    """The runs of these directories, in their order.

    Raises ComparisonError where one holds no run, is named twice, or where none has points.
    """
    runs, notes, experiments, seen = [], [], [], {}
    for directory in directories:
        first = seen.setdefault(directory.resolve(), directory)
        if first is not directory:
            raise ComparisonError(f"{directory} is named twice")
        record = _record(directory)
        run = _run(directory, record, notes)
        if record.status != "FINISHED":
            notes.append(f"{run.name} ({directory}) has not finished ({record.status}): what it has logged so far is compared")
        if not without_losses(run, f"{directory / METRICS_NAME} has none", notes):
            runs.append(run)
            experiments.append(record.experiment)
    if not runs:
        raise ComparisonError("there is nothing to compare: " + "; ".join(notes))
    return Selection("", ", ".join(dict.fromkeys(experiments)), "", runs, notes)


def combine(directories: Selection, experiment: Selection) -> Selection:
    """Runs of directories followed by those of an MLflow experiment; a run that is in both counts once."""
    notes, tracked = [*directories.notes, *experiment.notes], []
    known = {run.run_id: run for run in directories.runs if run.run_id}
    for run in experiment.runs:
        if run.run_id in known:
            known[run.run_id].tracked = True
            notes.append(f"{run.name}: of this run its directory {known[run.run_id].directory} is read, not MLflow")
        else:
            tracked.append(run)
    names = list(dict.fromkeys([*directories.experiment.split(", "), experiment.experiment]))
    return Selection(experiment.uri, ", ".join(names), experiment.experiment_id, [*directories.runs, *tracked], notes)


def tell_apart(runs: list[Run]) -> None:
    """Give runs of one name names of their own: where each was read."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({run.directory or 'MLflow'})"


def _record(directory: Path) -> RunRecord:
    try:
        return RunRecord.load(directory)
    except FileNotFoundError as error:
        raise ComparisonError(
            f"{directory} holds no run ({RECORD_NAME} is missing): name run directories, the output_dir of pretrain.train"
        ) from error
    except (OSError, ValueError) as error:
        raise ComparisonError(f"{directory} holds no run that can be read: {error}") from error


def _run(directory: Path, record: RunRecord, notes: list[str]) -> Run:
    if not (directory / METRICS_NAME).is_file():
        raise ComparisonError(f"{directory} holds no journal ({METRICS_NAME} is missing): the run has logged nothing, or it was moved away")
    path = directory / RUN_ID_NAME
    tags = record.tags | {"tracking.key": record.key}
    history: dict[str, dict[int, float]] = {}
    for name in (METRICS_NAME, SYSTEM_NAME):
        _read(directory / name, history, notes)
    return Run(
        name=record.run_name, run_id=path.read_text().strip() if path.exists() else "", status=record.status, started_ms=record.started_ms,
        params=dict(sorted(record.params.items())), tags={key: tags[key] for key in sorted(tags) if not key.startswith("mlflow.")},
        history={name: Curve(sorted(points), [points[step] for step in sorted(points)]) for name, points in sorted(history.items())},
        directory=str(directory), tracked=False,
    )  # fmt: skip


def _read(path: Path, history: dict[str, dict[int, float]], notes: list[str]) -> None:
    """Add a journal's points to `history`: metric -> step -> value. A last line without its end is being written."""
    for number, (line, _) in enumerate(iterate_lines(path, 0), start=1):
        try:
            fields = decode_line(line)
            points = {name: float(value) for name, value in fields.items() if name not in RESERVED_KEYS}
            step = int(fields["step"])
        except (ValueError, TypeError):
            notes.append(f"{path}, line {number} is damaged and left out")
            continue
        for name, value in points.items():
            if not name.startswith(JOURNAL_ONLY):
                history.setdefault(metric_name(name), {})[step] = value
