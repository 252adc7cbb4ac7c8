"""Compare runs, of directories or of an MLflow experiment: prints a table, writes runs.json, curves.png and index.html.

python -m pretrain.compare runs/dense runs/qsparse --output report/
python -m pretrain.compare --experiment quickstart --output report/
python -m pretrain.compare --experiment sweep --runs dense keep_0.4 --baseline dense --uri http://tracking:5000
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

from data_tools.arguments import Parser, exit_status, named_path

FORMAT_VERSION = 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (0, 1 when a run misses what is required, 2 when there is nothing to compare)."""
    parser = Parser(prog="python -m pretrain.compare", description="Compare runs, of directories or of an MLflow experiment.")
    parser.add_argument("directories", nargs="*", type=named_path, metavar="RUN_DIR", help="run directories (output_dir); needs no MLflow")
    parser.add_argument("--experiment", help="MLflow experiment that holds the runs, or further ones")
    parser.add_argument("--output", type=named_path, required=True, metavar="DIR", help="folder for runs.json, curves.png and index.html")
    parser.add_argument("--uri", default="", help="MLflow tracking URI (default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="of the experiment's runs those with these names (default: all)")
    parser.add_argument("--baseline", metavar="NAME", help="run the gaps refer to (default: the dense one, keep 1.0 without BitNet)")
    parser.add_argument(
        "--require-under-unigram", type=float, metavar="NAT", help="exit with 1 unless every run ends this far under the unigram entropy"
    )
    options = parser.parse_args(arguments)
    if not options.directories and options.experiment is None:
        parser.error("name run directories, or an MLflow experiment with --experiment")
    if options.runs and options.experiment is None:
        parser.error("--runs chooses among the runs of an MLflow experiment: name it with --experiment")
    if options.output.exists() and not options.output.is_dir():
        parser.error(f"--output {options.output} is a file: name a folder")
    if options.require_under_unigram is not None and not math.isfinite(options.require_under_unigram):
        parser.error("--require-under-unigram must be a finite number")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    from pretrain.compare.load import ComparisonError

    try:
        selection = select(options)
        summaries = report(selection, options.baseline, options.output)
    except BrokenPipeError:
        # No fault of a file: `exit_status` sees to it.
        raise
    except (ComparisonError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.require_under_unigram is None:
        return 0
    names = {summary.run for summary in summaries}
    asked = [name for name in options.runs or [] if f"{name} (MLflow)" not in names]
    return check_under_unigram(summaries, asked, options.require_under_unigram)


def select(options: argparse.Namespace) -> Any:
    """The runs that the command line names. Raises ComparisonError."""
    from pretrain.compare.directories import combine, load_directories, tell_apart
    from pretrain.compare.load import load_runs

    found = load_directories(options.directories) if options.directories else None
    if options.experiment is not None:
        tracked = load_runs(options.uri, options.experiment, options.runs)
        found = tracked if found is None else combine(found, tracked)
    tell_apart(found.runs)
    return found


def check_under_unigram(summaries: list[Any], asked: list[str], required: float) -> int:
    """Say which runs are not far enough under the unigram entropy; returns the exit code."""
    from pretrain.compare.table import misses

    lines = misses(summaries, asked, required)
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    if not lines:
        print(f"all {len(summaries)} runs are at least {required:g} nat under the unigram entropy")
    return 1 if lines else 0


def report(selection: Any, baseline_name: str | None, output: Path) -> list[Any]:
    """Print the comparison and write its files; returns the runs' summaries."""
    from pretrain.compare.figures import draw
    from pretrain.compare.load import ComparisonError
    from pretrain.compare.page import build_page
    from pretrain.compare.seeds import largest_spread, measure_seeds, seed_sentence
    from pretrain.compare.table import find_baseline, format_table, summarize, unequal_training
    from pretrain.compare.ui import charts_link, serve_command

    baseline = find_baseline(selection.runs, baseline_name)
    if baseline is None and baseline_name is not None:
        known = ", ".join(run.name for run in selection.runs)
        raise ComparisonError(f"the baseline {baseline_name!r} is not among the compared runs ({known})")
    if baseline is None:
        selection.notes.append("no run is dense (qsparse.keep 1.0, bitnet.enabled false), so there are no gaps: choose one with --baseline")
    else:
        selection.runs.sort(key=lambda run: run is not baseline)
        selection.notes += unequal_training(selection.runs, baseline)
    summaries = [summarize(run, baseline) for run in selection.runs]
    seeds = measure_seeds(selection.runs)
    link, command = (charts_link(selection), serve_command(selection.uri)) if selection.uri else (None, None)

    output.mkdir(parents=True, exist_ok=True)
    content = json.dumps(runs_json(selection, summaries, seeds, baseline), indent=1, allow_nan=False)
    (output / "runs.json").write_text(content + "\n")
    draw(selection.runs, baseline, largest_spread(seeds), output / "curves.png")
    (output / "index.html").write_text(build_page(selection, summaries, seeds, baseline, command, link))

    print(format_table(summaries, baseline))
    print("\ntrain loss: mean of the last 5 logged points")
    print(f"One seed does not rank runs whose gap is small. {seed_sentence(seeds, selection.experiment)}")
    for note in selection.notes:
        print(f"note: {note}")
    print(f"\nreport: {output / 'index.html'} (with curves.png and runs.json)")
    if link is not None:
        print("in MLflow:" + (f"\n  {command}\n  then open" if command else ""), link)
    return summaries


def runs_json(selection: Any, summaries: list[Any], seeds: list[Any], baseline: Any) -> dict[str, Any]:
    """Everything the report rests on, in full precision; NaN and infinities as strings, as in the journal."""
    from pretrain.compare.table import as_dict, differing_settings

    runs = [
        {
            "name": run.name,
            "run_id": run.run_id,
            "status": run.status,
            "started_ms": run.started_ms,
            "summary": {key: value for key, value in as_dict(summary).items() if key != "run"},
            "params": run.params,
            "tags": run.tags,
            "history": {name: {"steps": curve.steps, "values": curve.values} for name, curve in run.history.items()},
        }
        for run, summary in zip(selection.runs, summaries, strict=True)
    ]
    content = {
        "format_version": FORMAT_VERSION,
        "experiment": selection.experiment,
        "baseline": baseline.name if baseline else None,
        "notes": selection.notes,
        "seeds": [{"runs": group.names, "validation_losses": group.losses, "spread": group.spread} for group in seeds],
        "differing_settings": differing_settings(selection.runs),
        "runs": runs,
    }
    return _with_text_for_non_finite(content)


def _with_text_for_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_text_for_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_text_for_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


if __name__ == "__main__":
    sys.exit(exit_status(main))
