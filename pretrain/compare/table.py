"""The figures that sum a run up, and the table of them as text.

Which number is which: training loss is the mean of the last 5 logged points (single steps are noisy), validation loss is
the last one, sparsities are means of the last 5 logged points, speed is the median over the run, memory the maximum.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, fields

from megatron_qsparse.config import PROJECTIONS
from pretrain.compare.load import TRAIN_LOSS, VALIDATION_LOSS, Run

LAST_POINTS = 5
ENTROPY = "data/validation_unigram_entropy"


@dataclass(frozen=True)
class Summary:
    """One row of the table; None where a run has no such metric."""

    run: str
    train_loss: float | None
    """Mean of the last 5 logged training losses, nat per token."""
    validation_loss: float | None
    """Last validation loss, nat per token."""
    gap: float | None
    """Validation loss minus the baseline's, nat per token."""
    under_unigram: float | None
    """Unigram entropy of the held-out tokens minus the validation loss, nat per token."""
    sparsity: dict[str, float | None]
    """Fraction of activations that are zero, by projection, and "overall"; in [0, 1]."""
    parameters: float | None
    activated_parameters: float | None
    tokens_per_s: float | None
    """Median over the run."""
    peak_memory_gib: float | None
    """Maximum over the run."""


def find_baseline(runs: list[Run], name: str | None = None) -> Run | None:
    """The run called `name`; without a name the first dense full-precision one (qsparse.keep 1, bitnet.enabled false)."""
    if name is not None:
        return next((run for run in runs if run.name == name), None)
    return next((run for run in runs if _is_dense(run)), None)


def summarize(run: Run, baseline: Run | None) -> Summary:
    """The figures of one run against the baseline."""
    validation, entropy = run.last(VALIDATION_LOSS), run.last(ENTROPY)
    reference = baseline.last(VALIDATION_LOSS) if baseline else None
    speed, memory = run.history.get("perf/tokens_per_s"), run.history.get("perf/peak_memory_gib")
    return Summary(
        run=run.name,
        train_loss=_mean_of_last(run, TRAIN_LOSS),
        validation_loss=validation,
        gap=None if validation is None or reference is None else validation - reference,
        under_unigram=None if validation is None or entropy is None else entropy - validation,
        sparsity={name: _mean_of_last(run, f"sparsity/{name}") for name in (*PROJECTIONS, "overall")},
        parameters=run.last("model/parameters"),
        activated_parameters=run.last("model/activated_parameters"),
        tokens_per_s=statistics.median(speed.values) if speed else None,
        peak_memory_gib=max(memory.values) if memory else None,
    )


def unequal_training(runs: list[Run], baseline: Run) -> list[str]:
    """A note for each run whose last validation comes after another amount of training than the baseline's."""
    notes = []
    reference = baseline.history.get(VALIDATION_LOSS)
    for run in runs:
        curve = run.history.get(VALIDATION_LOSS)
        if reference is None or curve is None:
            continue
        here, there = curve.steps[-1], reference.steps[-1]
        if (here, run.last("train/tokens")) != (there, baseline.last("train/tokens")):
            seen, meant = si(run.last("train/tokens")), si(baseline.last("train/tokens"))
            notes.append(
                f"{run.name} is validated last at step {here} of {seen} tokens, {baseline.name} at step {there} of {meant}: "
                "their gap compares different amounts of training"
            )
    return notes


def columns(baseline: Run | None) -> list[str]:
    """Column titles of `cells`."""
    sparsities = [f"sparsity {name.split('.')[-1]}" for name in PROJECTIONS]
    gap = f"gap to {baseline.name}" if baseline else "gap"
    return ["run", "train loss", "val loss", gap, "under unigram", *sparsities, "parameters", "activated", "tokens/s", "peak GiB"]


def cells(summary: Summary) -> list[str]:
    """One row as text, "-" where there is no value."""
    return [
        summary.run,
        _text(summary.train_loss, ".3f"),
        _text(summary.validation_loss, ".3f"),
        _text(summary.gap, "+.3f"),
        _text(summary.under_unigram, ".3f"),
        *(_text(summary.sparsity[name], ".3f") for name in PROJECTIONS),
        si(summary.parameters),
        si(summary.activated_parameters),
        si(summary.tokens_per_s),
        _text(summary.peak_memory_gib, ".2f"),
    ]


def format_table(summaries: list[Summary], baseline: Run | None) -> str:
    """The table for the terminal: run names left, numbers right, titles of two lines where that keeps it narrow."""
    titles = [title.rsplit(" ", 1) if " " in title else ["", title] for title in columns(baseline)]
    rows = [[title[0] for title in titles], [title[1] for title in titles], *(cells(summary) for summary in summaries)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(titles))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([*lines[:2], "-" * len(lines[1]), *lines[2:]])


def differing_settings(runs: list[Run]) -> dict[str, list[str]]:
    """Parameters that are not the same in all runs: name -> value per run ("-" where a run lacks it).

    Where a run lives and what it is called (`output_dir`, `tracking.*`) always differs and is left out.
    """
    names = sorted({name for run in runs for name in run.params if not is_place(name)})
    table = {name: [run.params.get(name, "-") for run in runs] for name in names}
    return {name: values for name, values in table.items() if len(set(values)) > 1}


def is_place(parameter: str) -> bool:
    """Whether a parameter only says where a run lives and what it is called."""
    return parameter == "output_dir" or parameter.startswith("tracking.")


def misses(summaries: list[Summary], asked: list[str], required: float) -> list[str]:
    """A line for each run that is not at least `required` nat under the unigram entropy of the held-out tokens.

    Args:
        asked: names of runs that must be there, besides those of `summaries`.
    """
    lines = [f"{name} is left out of the comparison" for name in asked if name not in {summary.run for summary in summaries}]
    for summary in summaries:
        under = summary.under_unigram
        if under is None:
            lines.append(f"{summary.run} lacks {VALIDATION_LOSS if summary.validation_loss is None else ENTROPY}")
        elif not under >= required:
            lines.append(f"{summary.run} is {under:.3f} nat under the unigram entropy, {required:g} are required")
    return lines


def si(value: float | None) -> str:
    """Three significant digits with k, M, G or T; "-" for None."""
    if value is None or value != value:
        return "-"
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            scaled = value / factor
            return f"{scaled:.{max(0, 2 - len(str(int(abs(scaled)))) + 1)}f}{letter}"
    return f"{value:.3g}"


def as_dict(summary: Summary) -> dict[str, object]:
    """The summary's fields for runs.json, unrounded."""
    return {item.name: getattr(summary, item.name) for item in fields(summary)}


def _is_dense(run: Run) -> bool:
    try:
        keep = float(run.params.get("qsparse.keep", "nan"))
    except ValueError:
        return False
    return keep == 1.0 and run.params.get("bitnet.enabled", "").lower() == "false"


def _mean_of_last(run: Run, metric: str) -> float | None:
    curve = run.history.get(metric)
    return statistics.fmean(curve.values[-LAST_POINTS:]) if curve else None


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(row: list[str], widths: list[int]) -> str:
    first, *others = [
        text.ljust(width) if index == 0 else text.rjust(width) for index, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join([first, *others]).rstrip()
