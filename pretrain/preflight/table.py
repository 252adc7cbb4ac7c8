"""What a job's log shows of the examination: a table of figures, and one line."""

import statistics

from pretrain.preflight.judge import best_pairs
from pretrain.preflight.meeting import skews
from pretrain.preflight.report import Report

HEAD = ("node", "devices", "TFLOP/s", "in node GB/s", "pairs GB/s", "disk MB/s", "free GB", "clock s", "")


def table(reports: dict[str, Report], nodes: list[str], bad: dict[str, list[str]]) -> str:
    """A line for each node; figures of the slowest device and disk, and of the fastest pair."""
    clocks = skews({node: report.clock_s for node, report in reports.items() if report.clock_s is not None} or {"": 0.0})
    best = best_pairs(reports, {node: bad.get(node, []) for node in nodes})
    rows = [HEAD]
    for node in nodes:
        report = reports.get(node)
        mark = "bad" if node in bad else ""
        if report is None:
            rows.append((node, *["-"] * (len(HEAD) - 2), mark))
            continue
        disks = list(report.disks.values())
        rows.append((
            node, str(len(report.tflops)), _figure(min(report.tflops.values(), default=None)),
            _figure(report.in_node_gbps), _figure(best.get(node)),
            _figure(min((speed for _, speed in disks), default=None)), _figure(min((free / 1e9 for free, _ in disks), default=None)),
            f"{clocks[node]:+.2f}" if node in clocks else "-", mark,
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def summary(reports: dict[str, Report], nodes: list[str], bad: dict[str, list[str]]) -> str:
    """`preflight: 3 nodes, 14 s: all good | all-reduce 11.2 GB/s (slowest node3 10.9)`"""
    seconds = max((report.seconds for report in reports.values()), default=0.0)
    outcome = f"{len(bad)} bad: {' '.join(bad)}" if bad else "all good"
    parts = [f"preflight: {len(nodes)} node{'s' if len(nodes) > 1 else ''}, {seconds:.0f} s: {outcome}"]
    speeds = best_pairs(reports, {node: bad.get(node, []) for node in nodes})
    inside = {node: report.in_node_gbps for node, report in reports.items() if report.in_node_gbps is not None}
    for what, figures in (("all-reduce", speeds), ("in a node", inside)):
        if figures:
            slowest = min(figures, key=figures.__getitem__)
            told = f" (slowest {slowest} {figures[slowest]:.3g})" if len(figures) > 1 else ""
            parts.append(f"{what} {statistics.median(figures.values()):.3g} GB/s{told}")
    if bad and len(bad) == len(nodes) > 1:
        parts.append("every node is bad: look at the settings, the network and the file systems rather than at the nodes")
    return " | ".join(parts)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
