"""index.html: the comparison as one self-contained page, filled from assets/: it works offline, from a mail or a bucket."""

from __future__ import annotations

import html
import importlib.resources
import json
import math
from string import Template
from typing import Any

from megatron_qsparse.config import PROJECTIONS
from pretrain.compare.load import TRAIN_LOSS, VALIDATION_LOSS, Run, Selection
from pretrain.compare.seeds import SeedGroup, largest_spread, seed_sentence
from pretrain.compare.series import AXES, gap_points, loss_range, make_series, points_per_mean
from pretrain.compare.table import ENTROPY, LAST_POINTS, Summary, cells, columns, differing_settings, si

AXIS_TITLES = {"tokens": "Tokens", "flops": "Activated FLOPs"}


def build_page(
    selection: Selection, summaries: list[Summary], seeds: list[SeedGroup], baseline: Run | None, command: str | None, link: str | None
) -> str:
    """The whole page as text.

    Args:
        summaries: one per run of the selection, in its order.
        seeds: the runs that differ in their seed alone.
        command: shell command that serves MLflow, None when a server runs already.
        link: opens these runs in MLflow, None where they were read from their directories alone.
    """
    runs = selection.runs
    entropy = next((value for run in runs if (value := run.last(ENTROPY)) is not None), None)
    spread = largest_spread(seeds)
    data = page_data(runs, baseline, entropy, spread)
    band = "" if spread is None else f" Inside the band a gap is no larger than what seeds of one setting differed by ({spread:.3f} nat)."
    has_gap = baseline is not None and any(gap_points(run, baseline) for run in runs)
    size = points_per_mean(max(len(run.history[TRAIN_LOSS].steps) for run in runs))
    buttons = [
        f'<button type="button" data-value="{axis["key"]}" aria-pressed="{str(index == 0).lower()}">{AXIS_TITLES[axis["key"]]}</button>'
        for index, axis in enumerate(data["axes"])
    ]
    return Template(_asset("page.html")).substitute(
        title=html.escape(f"{selection.experiment}: run comparison"),
        style=_asset("page.css"),
        experiment=html.escape(selection.experiment),
        lead=html.escape(_lead(runs, baseline)),
        axis_buttons="".join(buttons),
        smoothing=f" (means of {size} logged points)" if size > 1 else "",
        gap_section=Template(_asset("gap.html")).substitute(baseline=html.escape(baseline.name), band=band) if has_gap else "",
        results=_results(runs, summaries, baseline),
        last_points=LAST_POINTS,
        entropy=f" ({entropy:.3f})" if entropy is not None else "",
        seeds=html.escape(seed_sentence(seeds, selection.experiment)),
        notes=_list(selection.notes),
        settings=_settings(runs),
        mlflow=_mlflow(command, link),
        # "</" would end the script element in the middle of a name that contains it.
        data=json.dumps(data, allow_nan=False, separators=(",", ":")).replace("</", "<\\/"),
        script=_asset("page.js"),
    )


def page_data(runs: list[Run], baseline: Run | None, entropy: float | None, spread: float | None) -> dict[str, Any]:
    """What the page's script draws; non-finite values become null."""
    axes = []
    for key, (metric, label) in AXES.items():
        series = [item for run in runs if (item := make_series(run, baseline, key))]
        if series:
            axes.append({"key": key, "metric": metric, "label": label, "range": loss_range(series, entropy)})
    described = []
    for index, run in enumerate(runs):
        series = {axis["key"]: item for axis in axes if (item := make_series(run, baseline, axis["key"]))}
        lists = {key: {name: [_rounded(value) for value in values] for name, values in vars(item).items()} for key, item in series.items()}
        final = run.last(VALIDATION_LOSS)
        described.append({"name": run.name, "index": index, "final": None if final is None else _rounded(final), "series": lists})
    return {
        "axes": axes or [{"key": "tokens", "metric": "", "label": "no run has train/tokens", "range": [0, 1]}],
        "runs": described,
        "baseline": baseline.name if baseline else None,
        "entropy": entropy,
        "spread": spread,
    }


def _lead(runs: list[Run], baseline: Run | None) -> str:
    tokens = {run.last("train/tokens") for run in runs} - {None}
    count = "One run" if len(runs) == 1 else f"{len(runs)} runs"
    seen = f" of {si(next(iter(tokens)))} tokens" + (" each" if len(runs) > 1 else "") if len(tokens) == 1 else ""
    against = f", compared with {baseline.name}" if baseline and len(runs) > 1 else ""
    return f"{count}{seen}{against}."


def _results(runs: list[Run], summaries: list[Summary], baseline: Run | None) -> str:
    titles = columns(baseline)
    first = 5
    last = first + len(PROJECTIONS)
    plain = [f'<th rowspan="2">{html.escape(title)}</th>' for title in titles]
    group = f'<th class="group" colspan="{len(PROJECTIONS)}">sparsity at the input of</th>'
    second = "".join(f'<th title="{name}">{name.split(".")[-1]}</th>' for name in PROJECTIONS)
    head = f"<thead><tr>{''.join(plain[:first])}{group}{''.join(plain[last:])}</tr><tr>{second}</tr></thead>"
    rows = []
    for index, (run, summary) in enumerate(zip(runs, summaries, strict=True)):
        name, *values = cells(summary)
        marked = "".join(f"<td{' class=strong' if column == 1 else ''}>{value}</td>" for column, value in enumerate(values))
        kind = ' class="reference"' if run is baseline else ""
        dot = f'<i class="dot" style="background:var(--c{index % 8})"></i>'
        rows.append(f'<tr{kind}><th scope="row">{dot}{html.escape(name)}</th>{marked}</tr>')
    return f"<table>{head}<tbody>{''.join(rows)}</tbody></table>"


def _settings(runs: list[Run]) -> str:
    table = differing_settings(runs)
    if not table:
        return '<p class="hint">None: all logged settings are the same.</p>'
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = []
    for name, values in table.items():
        data = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{html.escape(name)}</th>{data}</tr>')
    return f'<div class="scroll"><table><thead><tr><th>setting</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _mlflow(command: str | None, link: str | None) -> str:
    if link is None:
        command = "<code>python -m pretrain.tracking sync RUN_DIR</code>"
        return f'<p class="plain">These runs were read from their directories; {command} ships them.</p>'
    anchor = f'<a href="{html.escape(link)}">open the charts of these runs</a>'
    if command is None:
        return f'<p class="plain">All metrics, parameters and environments: {anchor}.</p>'
    shown = f"<pre>{html.escape(command)}</pre>"
    return f'<p class="plain">All metrics, parameters and environments: start</p>{shown}<p class="plain">then {anchor}.</p>'


def _asset(name: str) -> str:
    return importlib.resources.files("pretrain.compare").joinpath("assets", name).read_text()


def _list(notes: list[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(note)}</li>' for note in notes)}</ul>" if notes else ""


def _rounded(value: float) -> float | None:
    """Seven significant digits: more than a screen shows, half the size of the full number (which runs.json has)."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
