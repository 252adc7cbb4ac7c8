"""Which nodes are bad, by the reports of their processes. Imports no torch."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from pretrain.preflight.reports import Report

FRACTION = 0.5
"""Of the median of the nodes, below which a node is slow."""
MAX_SKEW_S = 5.0
"""By which a clock may be wrong: times in logs and journals would contradict each other."""


@dataclass
class Verdict:
    """Of all nodes."""

    problems: dict[str, list[str]] = field(default_factory=dict)
    """node -> what is wrong with it, of those with whom something is."""
    table: list[tuple[str, ...]] = field(default_factory=list)
    """node, devices, TFLOP/s of the slowest, all-reduce inside and between in GB/s, disk in MB/s, clock in s; first the heads."""
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[str]:
        return sorted(self.problems)


def judge(reports: Sequence[Report], nodes: Sequence[str], per_node: int, fraction: float = FRACTION) -> Verdict:
    """nodes: those that were to report, with `per_node` processes each."""
    of = {node: [report for report in reports if report.node == node] for node in nodes}
    verdict = Verdict()
    for node, found in of.items():
        missing = sorted(set(range(per_node)) - {report.local_rank for report in found})
        problems = [problem for report in found for problem in report.problems]
        if missing:
            which = f"processes {', '.join(map(str, missing))} of {per_node}" if per_node > 1 else "its process"
            problems.append(f"did not report ({which}): it does not answer, hangs, or cannot write to the shared folder")
        problems += [
            f"its clock is {abs(r.skew_s):.1f} s {'ahead' if r.skew_s > 0 else 'behind'}"
            for r in found
            if r.skew_s is not None and abs(r.skew_s) > MAX_SKEW_S and r.local_rank == 0
        ]
        if problems:
            verdict.problems[node] = problems
        verdict.notes += [f"{node}: {report.note}" for report in found if report.note and report.local_rank == 0]
    without = [node for node, found in of.items() if any(report.device == "CPU" for report in found)]
    if 0 < len(without) < sum(map(bool, of.values())):
        for node in without:
            verdict.problems.setdefault(node, []).append("has no GPU that torch finds, others have")
    _compare(verdict, of, fraction)
    verdict.table = _table(of)
    return verdict


def _compare(verdict: Verdict, of: dict[str, list[Report]], fraction: float) -> None:
    for what, unit, figure in (
        ("computes", "TFLOP/s", slowest),
        ("reduces among its own devices", "GB/s", inside),
        ("reduces", "GB/s", between),
    ):
        figures = {node: value for node, found in of.items() if (value := figure(found)) is not None}
        if len(figures) < 2 or figure is between and len(figures) == 2:
            # Of two nodes each has the other's figure.
            continue
        # Of two the better one says what is possible.
        usual = statistics.median(figures.values()) if len(figures) > 2 else max(figures.values())
        for node, value in figures.items():
            if value < fraction * usual:
                verdict.problems.setdefault(node, []).append(
                    f"{what} at {value:.3g} {unit}, {value / usual:.0%} of what is usual here ({usual:.3g})"
                )


def slowest(found: list[Report]) -> float | None:
    return min((report.tflops for report in found if report.tflops is not None), default=None)


def inside(found: list[Report]) -> float | None:
    return min((report.inside_gb_s for report in found if report.inside_gb_s is not None), default=None)


def between(found: list[Report]) -> float | None:
    """With the better one of its neighbours."""
    return max((value for report in found for value in report.between_gb_s.values()), default=None)


def _table(of: dict[str, list[Report]]) -> list[tuple[str, ...]]:
    rows = [("node", "devices", "TFLOP/s", "inside GB/s", "between GB/s", "disk MB/s", "clock s")]
    for node, found in of.items():
        first = next((report for report in found if report.local_rank == 0), None)
        names = sorted({report.device for report in found if report.device})
        values = (slowest(found), inside(found), between(found), first and first.disk_mb_s, first and first.skew_s)
        shown = [f"{value:.3g}" if value is not None else "-" for value in values[:-1]]
        skew = f"{values[-1]:+.2f}" if values[-1] is not None else "-"
        rows.append((node, f"{len(found)} x {', '.join(names) or '?'}", *shown, skew))
    return rows
