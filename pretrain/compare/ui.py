"""The way from a comparison into MLflow's own pages: the command that serves them and a link with these runs charted.

MLflow's "share" button stores the state of the charts page in the experiment tag `mlflow.sharedViewState.<key>` and opens
it with `?viewStateShareKey=<key>`. That format is not documented; this one is what MLflow 3.17 reads. Should a later
MLflow ignore it, the link still opens the experiment's runs in chart view.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from pretrain.compare.load import Selection
from pretrain.tracking.store import connect, shipping_errors

logger = logging.getLogger(__name__)

PORT = 5000
CHARTS = (
    ("Validation loss", "val/loss", "step"),
    ("Training loss against tokens", "train/loss", "train/tokens"),
    ("Training loss against activated FLOPs", "train/loss", "train/activated_flops"),
    ("Validation loss against activated FLOPs", "val/loss", "train/activated_flops"),
    ("Achieved sparsity", "sparsity/overall", "step"),
    ("Tokens per second", "perf/tokens_per_s", "step"),
)


def serve_command(uri: str) -> str | None:
    """The shell command that serves MLflow's pages for a database; None when `uri` is a server already."""
    if uri.startswith("http"):
        return None
    beside = Path(sys.executable).with_name("mlflow")
    program = [str(beside)] if beside.exists() else [sys.executable, "-m", "mlflow"]
    return shlex.join([*program, "ui", "--backend-store-uri", uri, "--port", str(PORT)])


def charts_link(selection: Selection) -> str:
    """Store the chart view and return the link that opens it; without permission to store it, the plain chart view."""
    base = selection.uri.rstrip("/") if selection.uri.startswith("http") else f"http://127.0.0.1:{PORT}"
    page = f"{base}/#/experiments/{selection.experiment_id}/runs"
    content = json.dumps(view_state(selection), sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:12]
    try:
        client = connect(selection.uri)
        client.set_experiment_tag(selection.experiment_id, f"mlflow.sharedViewState.{key}", content)
    except shipping_errors() as error:
        logger.warning("the charts of this comparison could not be stored in MLflow: %s", error)
        return f"{page}?compareRunsMode=CHART"
    return f"{page}?viewStateShareKey={key}&compareRunsMode=CHART"


def view_state(selection: Selection) -> dict[str, Any]:
    """The state of MLflow's charts page: our charts, filtered to the compared runs."""
    section = _identifier("section")
    run_ids = ", ".join(f"'{run.run_id}'" for run in selection.runs if run.tracked)
    return {
        "searchFilter": f"attributes.run_id IN ({run_ids})",
        "orderByKey": "attributes.start_time",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "runsHiddenMode": "SHOWALL",
        "runListHidden": False,
        "viewMaximized": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "isAccordionReordered": False,
        "compareRunSections": [
            {"uuid": section, "name": "Comparison", "display": True, "isReordered": False, "deleted": False, "isGenerated": False}
        ],
        "compareRunCharts": [_line_chart(title, metric, axis, section) for title, metric, axis in CHARTS],
    }


def _line_chart(title: str, metric: str, axis: str, section: str) -> dict[str, Any]:
    by_metric = axis != "step"
    return {
        "uuid": _identifier(title),
        "type": "LINE",
        "displayName": title,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 10,
        "lineSmoothness": 0,
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "xAxisKey": "metric" if by_metric else "step",
        "selectedXAxisMetricKey": axis if by_metric else "",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "range": {},
        "ignoreOutliers": False,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
    }


def _identifier(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
