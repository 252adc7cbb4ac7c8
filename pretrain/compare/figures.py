"""curves.png: loss against tokens, loss against activated FLOPs, and the validation gap to the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.compare.load import Run
from pretrain.compare.series import AXES, Series, gap_points, loss_range, make_series, points_per_mean
from pretrain.compare.table import ENTROPY, TRAIN_LOSS, si

# Okabe and Ito's palette: told apart with every common colour blindness; markers repeat the distinction without colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A00", "#555555")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LEAST_REACH = 0.01
LABEL_HEIGHT = 0.045
"""Of a panel's height."""
GREY = "#5b6470"


def draw(runs: list[Run], baseline: Run | None, spread: float | None, path: Path) -> None:
    """Write the figure as PNG, with a band of +-`spread` nat behind the gaps. The same runs give the same picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    available = [axis for axis in AXES if any(AXES[axis][0] in run.history for run in runs)]
    with_gap = baseline is not None and any(len(gap_points(run, baseline)) > 1 for run in runs)
    settings = {
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9aa2ad",
        "axes.labelcolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.grid": True,
        "grid.color": "#e6e9ee",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
    }
    with pyplot.rc_context(settings):
        count = max(1, len(available)) + with_gap
        figure, panels = pyplot.subplots(1, count, figsize=(4.9 * count, 4.5), squeeze=False, layout="constrained")
        panels = list(panels[0])
        entropy = next((value for run in runs if (value := run.last(ENTROPY)) is not None), None)
        for panel, axis in zip(panels, available, strict=False):
            series = {run.name: item for run in runs if (item := make_series(run, baseline, axis))}
            _draw_losses(panel, runs, series, entropy)
            panel.set_title(f"Loss against {AXES[axis][1]}", pad=10)
            panel.set_xlabel(AXES[axis][1])
        if with_gap:
            _draw_gaps(panels[-1], runs, baseline, spread)
        for panel in panels:
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
            panel.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
            panel.tick_params(length=0)
        handles = [
            pyplot.Line2D([], [], color=color, marker=marker, markersize=6, linewidth=1.6, label=run.name)
            for run, color, marker in _styles(runs)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(runs), 6), frameon=False, fontsize=10.5)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        pyplot.close(figure)


def _draw_losses(panel: Any, runs: list[Run], series: dict[str, Series], entropy: float | None) -> None:
    low, high = loss_range(list(series.values()), entropy)
    for run, color, marker in _styles(runs):
        if run.name not in series:
            continue
        item = series[run.name]
        panel.plot(item.train_x, item.train_loss, color=color, linewidth=0.9, alpha=0.75)
        panel.plot(
            item.validation_x,
            item.validation_loss,
            marker,
            color=color,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.8,
            zorder=3,
        )
    if entropy is not None and low < entropy < high:
        panel.axhline(entropy, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        panel.annotate(
            f"unigram entropy {entropy:.3f}",
            (1, entropy),
            (0, -4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="top",
            color=GREY,
            fontsize=8.5,
        )
    panel.set_ylim(low, high)
    panel.set_xlim(left=0)
    panel.set_ylabel("nat per token")
    logged = max(len(run.history[TRAIN_LOSS].steps) for run in runs)
    size = points_per_mean(logged)
    line = f"line: training, mean of {size} logged points" if size > 1 else "line: training"
    # Losses fall from the upper left to the lower right, so this corner is free.
    panel.annotate(f"{line}\nmarker: validation", (0.02, 0.03), xycoords="axes fraction", va="bottom", color=GREY, fontsize=8.5)


def _draw_gaps(panel: Any, runs: list[Run], baseline: Run, spread: float | None) -> None:
    if spread is not None:
        panel.axhspan(-spread, spread, color="#eceff3", zorder=0, linewidth=0)
        text = f"grey: seeds of one setting\ndiffered by up to {spread:.3f} nat"
        panel.annotate(text, (0.02, 0.03), xycoords="axes fraction", color=GREY, fontsize=8.5, va="bottom")
    panel.axhline(0, color=GREY, linewidth=1)
    finite, last, end = [], [], 1
    for run, color, marker in _styles(runs):
        points = gap_points(run, baseline)
        if not points:
            continue
        finite += [gap for _, gap in points]
        end = max(end, points[-1][0])
        steps, gaps = zip(*points, strict=True)
        panel.plot(steps, gaps, color=color, marker=marker, markersize=6, markeredgecolor="white", markeredgewidth=0.8, linewidth=1.4)
        last.append((gaps[-1], steps[-1], color))
    least = max(spread or 0.0, LEAST_REACH)
    reach = _reach([[gap for _, gap in gap_points(run, baseline)] for run in runs], least)
    low = -reach if min(finite) < -least else -1.7 * least
    panel.set_ylim(low, reach)
    last.sort(key=lambda end_of_run: end_of_run[0])
    heights = _apart([gap for gap, _, _ in last], LABEL_HEIGHT * (reach - low))
    for (gap, step, color), height in zip(last, heights, strict=True):
        panel.annotate(f"{gap:+.3f}", (step, height), (7, 0), textcoords="offset points", va="center", color=color, fontsize=9)
    panel.set_xlim(0, 1.16 * end)
    panel.set_title(f"Validation gap to {baseline.name}", pad=10)
    panel.set_xlabel("step")
    panel.set_ylabel("nat per token")


def _apart(heights: list[float], distance: float) -> list[float]:
    """Sorted heights of labels, each moved up as little as keeps it `distance` above the one below."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + distance) if moved else height)
    return moved


def _tick(value: float) -> str:
    """6.00T -> 6T"""
    number, letter = (si(value)[:-1], si(value)[-1]) if si(value)[-1:].isalpha() else (si(value), "")
    return f"{float(number):g}{letter}"


def _reach(gaps: list[list[float]], least: float) -> float:
    """Half height of the gap axis. The first validation may differ wildly between learning rates; it may leave the picture."""
    later = max([1.5 * least, *(abs(gap) for run in gaps for gap in run[1:])])
    return 1.12 * max([later, *(abs(run[0]) for run in gaps if run and abs(run[0]) < 2 * later)])


def _styles(runs: list[Run]) -> list[tuple[Run, str, str]]:
    return [(run, COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]) for index, run in enumerate(runs)]
