"""Which nodes are bad, by all their reports: what each says of itself, and how its figures compare with those of the others."""

import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pretrain.preflight.meeting import skews
from pretrain.preflight.report import Report, path_of, this_start

BAD = "bad"
"""File of the bad nodes' names, one a line."""
GRACE_S = 3.0
"""For a file that was written just before on another machine."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    fraction: float = 0.5
    """Of the median, below which a speed is bad; in (0, 1)."""
    clock_skew_s: float = 5.0
    """Between a node's clock and the median one."""
    min_gbps: float = 0.0
    """Bus bandwidth between nodes that is bad whatever the others have; 0 asks for none."""


def read_reports(folder: Path, nodes: list[str]) -> tuple[dict[str, Report], dict[str, str]]:
    """(node -> its report, node -> why there is none). Waits a little for those that are missing."""
    reports: dict[str, Report] = {}
    missing = dict.fromkeys(nodes, "")
    deadline = time.monotonic() + GRACE_S
    while True:
        for node in list(missing):
            try:
                report = Report.read(folder, node)
                if report.start != this_start():
                    raise FileNotFoundError("of an earlier start")
                reports[node] = report
                del missing[node]
            except FileNotFoundError:
                missing[node] = "did not report"
            except (OSError, ValueError) as error:
                missing[node] = f"left a report that cannot be read, {path_of(folder, node)} ({error})"
        if not missing or time.monotonic() > deadline:
            return {node: reports[node] for node in nodes if node in reports}, missing
        time.sleep(0.2)


def judge(reports: dict[str, Report], missing: dict[str, str], nodes: list[str], limits: Limits, timeout_s: float) -> dict[str, list[str]]:
    """Bad node -> what is wrong with it, in the order of `nodes`.

    timeout_s: that a node without a report had, where no other says it.
    """
    limit = max((report.timeout_s for report in reports.values()), default=timeout_s)
    found: dict[str, list[str]] = {node: [] for node in nodes}
    came = {member for report in reports.values() for member in report.members}
    for node, why in missing.items():
        if why == "did not report":
            why = "took part, but left no report: does it see the directory?" if node in came else f"{why} within {limit:.0f} s"
        found[node].append(why)
    for node, report in reports.items():
        found[node] += report.problems
        if not report.done:
            found[node].append(f"did not end within {report.timeout_s:.0f} s: last heard of {report.doing}")
    _add(found, _unreached(reports, nodes, found))
    _add(found, _kinds(reports))
    _add(found, _speeds(reports, limits))
    _add(found, _manifests(reports))
    _add(found, _clocks(reports, limits))
    # Last: what is known already tells which partner of a pair is at fault.
    _add(found, _pairs(reports, limits, found))
    return {node: told for node, told in found.items() if told}


def write_bad(folder: Path, bad: Iterable[str]) -> None:
    """Replace the file as a whole; it is empty where all are good. Raises OSError."""
    beside = folder / f".{BAD}"
    with beside.open("w") as file:
        file.write("".join(f"{node}\n" for node in bad))
        file.flush()
        os.fsync(file.fileno())
    beside.replace(folder / BAD)


def _add(found: dict[str, list[str]], more: dict[str, list[str]]) -> None:
    for node, told in more.items():
        found[node] += told


def _unreached(reports: dict[str, Report], nodes: list[str], found: dict[str, list[str]]) -> dict[str, list[str]]:
    """Who did not meet the others: not at fault where the first node is, as it is for all of them where nobody reached it."""
    told = {node: report.unreached for node, report in reports.items() if report.unreached}
    if nodes[0] in told:
        return {nodes[0]: [told[nodes[0]]]}
    if found[nodes[0]] and (nodes[0] not in reports or not reports[nodes[0]].done):
        return {}
    others = [node for node in reports if node != nodes[0]]
    if len(others) > 1 and len(told) == len(others):
        return {nodes[0]: [f"no other node met it: {next(iter(told.values()))}"]}
    return {node: [why] for node, why in told.items()}


def _kinds(reports: dict[str, Report]) -> dict[str, list[str]]:
    without = [node for node, report in reports.items() if report.device == "CPU"]
    with_gpu = [node for node, report in reports.items() if report.device not in ("", "CPU")]
    return {node: ["has no NVIDIA driver, other nodes have: see nvidia-smi there"] for node in without} if with_gpu else {}


def _speeds(reports: dict[str, Report], limits: Limits) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {node: [] for node in reports}
    everything = [speed for report in reports.values() for speed in report.tflops.values()]
    middle = statistics.median_high(everything) if everything else 0.0
    for node, report in reports.items():
        for device, speed in report.tflops.items():
            if speed < limits.fraction * middle:
                found[node].append(f"{device} computes slowly: {speed:.3g} TFLOP/s, the median of all is {middle:.3g}")
    inside = {node: report.in_node_gbps for node, report in reports.items() if report.in_node_gbps is not None}
    middle = statistics.median_high(inside.values()) if inside else 0.0
    for node, speed in inside.items():
        if speed < limits.fraction * middle:
            found[node].append(f"all-reduce among its devices is slow: {speed:.3g} GB/s, the median of the nodes is {middle:.3g}")
    return found


def _manifests(reports: dict[str, Report]) -> dict[str, list[str]]:
    digests = {node: report.manifest for node, report in reports.items() if report.manifest}
    if len(set(digests.values())) < 2:
        return {}
    usual = statistics.mode(digests.values())
    return {
        node: [f"sees other shards than the others: its manifest is {digest[:12]}, not {usual[:12]}"]
        for node, digest in digests.items()
        if digest != usual
    }


def _clocks(reports: dict[str, Report], limits: Limits) -> dict[str, list[str]]:
    clocks = {node: report.clock_s for node, report in reports.items() if report.clock_s is not None}
    if len(clocks) < 2:
        return {}
    if len(clocks) == 2:
        (first, one), (second, two) = clocks.items()
        text = f"clocks of {first} and {second} are {abs(two - one):.1f} s apart, nothing tells which is wrong: see to time synchronization"
        return {first: [text], second: [text]} if abs(two - one) > limits.clock_skew_s else {}
    return {
        node: [f"clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the median of the nodes: see to time synchronization"]
        for node, skew in skews(clocks).items()
        if abs(skew) > limits.clock_skew_s
    }


def best_pairs(reports: dict[str, Report], bad: dict[str, list[str]]) -> dict[str, float]:
    """Node -> GB/s of its fastest pair; partners that are bad for other reasons do not count against it."""
    best = {}
    for node, report in reports.items():
        # Of both, since one that was stopped for a while measures others as slow.
        speeds = [
            max(speed, reports[other].pairs.get(node, 0.0)) if other in reports else speed
            for other, speed in report.pairs.items()
            if not bad[other] or speed
        ]
        if speeds:
            best[node] = max(speeds)
    return best


def _pairs(reports: dict[str, Report], limits: Limits, bad: dict[str, list[str]]) -> dict[str, list[str]]:
    best = best_pairs(reports, bad)
    if not best:
        return {}
    middle = statistics.median_high(best.values())
    floor = max(limits.fraction * middle, limits.min_gbps)
    slow = {node: speed for node, speed in best.items() if speed < floor or not speed}
    if len(slow) == len(best) == 2:
        first, second = slow
        if bad[first] or bad[second]:
            return {}
        why = next((why for report in reports.values() for why in report.failures.values()), "")
        told = f"is slow: {best[first]:.3g} GB/s, {limits.min_gbps:.3g} are needed" if best[first] else f"failed ({why})"
        text = f"the all-reduce between {first} and {second} {told}; nothing tells which of the two is at fault"
        return {first: [text], second: [text]}
    found = {}
    for node, speed in slow.items():
        others = ", ".join(reports[node].pairs)
        if speed:
            usual = f"the median of the nodes is {middle:.3g}" if speed < limits.fraction * middle else f"{floor:.3g} are needed"
            found[node] = [f"all-reduce with {others} is slow: {speed:.3g} GB/s, {usual}"]
        else:
            found[node] = [f"all-reduce with {others} failed ({next(iter(reports[node].failures.values()), '')})"]
    return found
