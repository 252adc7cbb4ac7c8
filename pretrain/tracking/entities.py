"""MLflow's entities made of journal lines and records, within what MLflow accepts: names, lengths, repeated points."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.tracking.journal import JOURNAL_ONLY, RESERVED_KEYS, decode_line, iterate_lines
from pretrain.tracking.record import DatasetInput, RunRecord

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput as MlflowDatasetInput
    from mlflow.entities import Metric, Param, RunTag

logger = logging.getLogger(__name__)

PARAMETER_LENGTH = 6000
TAG_LENGTH = 8000
DIGEST_LENGTH = 36
KEY_LENGTH = 250

FirstPoints = dict[tuple[int, str], tuple[float, int]]
"""(step, metric) -> (value, timestamp in ms)."""


def points_of(path: Path, line: bytes, first: FirstPoints) -> list[Metric]:
    """The points of a line of the journal `path`; none, with a warning, of a damaged one.

    A point that `first` has with the same value gets the timestamp from there, so that MLflow sees it is one point.
    """
    from mlflow.entities import Metric

    try:
        fields = decode_line(line)
    except ValueError as error:
        logger.warning("%s: skipped a damaged line (%s)", path, error)
        return []
    step, now = fields["step"], fields["timestamp_ms"]
    points = []
    for key, value in fields.items():
        if key in RESERVED_KEYS or key.startswith(JOURNAL_ONLY):
            continue
        earlier, timestamp = first.get((step, key), (None, now))
        if not _same(earlier, value):
            timestamp = now
        points.append(Metric(metric_name(key), float(value), timestamp, step))
    return points


def discarded_points(path: Path) -> FirstPoints:
    """The newest point of each step and metric among the steps that resumes have discarded into the journal `path`."""
    points: FirstPoints = {}
    for line, _ in iterate_lines(path, 0):
        try:
            fields = decode_line(line)
        except ValueError:
            continue  # a damaged discarded line only costs its points their first timestamp
        for key, value in fields.items():
            place = (fields["step"], key)
            if key not in RESERVED_KEYS and not _same(points.get(place, (None,))[0], value):
                points[place] = (value, fields["timestamp_ms"])
    return points


def metric_name(name: str) -> str:
    """The name MLflow accepts for a metric: what it refuses becomes "_" ("layer[3]" -> "layer_3_")."""
    parts = [part for part in re.sub(r"[^/\w.\- :]", "_", name)[:KEY_LENGTH].split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "_"


def params_of(record: RunRecord) -> list[Param]:
    from mlflow.entities import Param

    return [Param(name[:KEY_LENGTH], _cut(value, PARAMETER_LENGTH)) for name, value in record.params.items()]


def tags_of(record: RunRecord) -> list[RunTag]:
    from mlflow.entities import RunTag

    return [RunTag(name[:KEY_LENGTH], _cut(value, TAG_LENGTH)) for name, value in record.tags.items()]


def dataset_of(item: DatasetInput) -> MlflowDatasetInput:
    from mlflow.entities import Dataset, InputTag
    from mlflow.entities import DatasetInput as MlflowDatasetInput

    dataset = Dataset(
        name=item.name,
        digest=item.digest[:DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": item.source}),
        profile=json.dumps({"digest": item.digest}),
    )
    return MlflowDatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", item.context)])


def _same(first: Any, second: Any) -> bool:
    return first == second or (first is not None and first != first and second != second)


def _cut(value: str, length: int) -> str:
    return value if len(value) <= length else value[: length - 3] + "..."
