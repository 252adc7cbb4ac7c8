"""How a status is shown: a line of a table, a page, JSON."""

import dataclasses
import json
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from pretrain.job.attempts import Attempt
from pretrain.status.state import Status
from pretrain.words import duration, thousands

FORMAT_VERSION = 1
"""Of the JSON."""
UNKNOWN = "-"
HEAD = ("run", "state", "job", "step", "eta", "loss", "tok/s", "checkpoint", "restarts", "skipped", "goodput", "")
LAST_ATTEMPTS = 5
"""Shown on a page."""
LAST_PROBLEMS = 8


def table(statuses: Sequence[Status], now: float) -> list[str]:
    """A line for each run, below a head."""
    rows = [HEAD, *(_cells(status, now) for status in statuses)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(status: Status, now: float) -> tuple[str, ...]:
    return (
        str(status.directory), status.state, status.job or UNKNOWN, _progress(status), _or_unknown(status.eta_s, duration),
        _or_unknown(status.loss, "{:.4f}".format), _or_unknown(status.tokens_per_s, thousands),
        UNKNOWN if status.checkpoint_step is None else f"{status.checkpoint_step}, {_ago(status.checkpoint_time, now)}",
        str(status.restarts), _or_unknown(status.skipped_steps, str), _goodput(status), status.note,
    )  # fmt: skip


def page(status: Status, now: float) -> list[str]:
    """Everything of one run."""
    since = f" since {_clock(status.since)}, {_ago(status.since, now)}" if status.since is not None else ""
    rows = [("state", status.state + since + (f": {status.note}" if status.note else ""))]
    if status.job or status.attempts:
        rows += _job_rows(status)
    rows.append(("step", _progress(status) + (f", {_ago(status.last_line, now)}" if status.last_line is not None else "")))
    if status.eta_s is not None:
        rows.append(("eta", f"{duration(status.eta_s)}, at {_clock(now + status.eta_s)}"))
    validation = "" if status.validation_loss is None else f", validation {status.validation_loss:.4f}"
    rows.append(("loss", _or_unknown(status.loss, "{:.4f}".format) + validation))
    if status.tokens_per_s is not None:
        rows.append(("speed", f"{thousands(status.tokens_per_s)} tokens/s, {_or_unknown(status.step_time_s, '{:.3g}'.format)} s a step"))
    saved = "none" if status.checkpoint_step is None else f"step {status.checkpoint_step}, {_ago(status.checkpoint_time, now)}"
    rows += [("checkpoint", saved), ("restarts", str(status.restarts)), ("roll-backs", str(status.rollbacks))]
    rows += [("skipped", _or_unknown(status.skipped_steps, "{} steps".format)), ("goodput", _goodput(status) + _of_what(status))]
    if status.unshipped is not None:
        rows.append(("MLflow", f"{status.unshipped:,} unshipped points" if status.unshipped else "has every point"))
    lines = [str(status.directory), *_aligned(rows)]
    if status.attempts:
        first = max(0, len(status.attempts) - LAST_ATTEMPTS)
        lines += ["", f"attempts ({len(status.attempts)})"]
        lines += _aligned([(f"{i + 1}", _attempt(status.attempts[i])) for i in range(first, len(status.attempts))])
    if status.problems:
        lines += ["", "problems", *(f"  {problem}" for problem in status.problems[-LAST_PROBLEMS:])]
    return lines


def to_json(statuses: Sequence[Status], errors: Sequence[str], now: float) -> str:
    """Numbers that JSON does not know are the texts NaN, Infinity and -Infinity; times are seconds since the epoch."""
    runs = [_plain(dataclasses.asdict(status) | {"goodput": status.goodput and status.goodput.share}) for status in statuses]
    return json.dumps({"format_version": FORMAT_VERSION, "time": now, "runs": runs, "errors": list(errors)}, indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, (int, float, str, type(None))) else str(value)


def _job_rows(status: Status) -> list[tuple[str, str]]:
    rows = []
    if status.job:
        rows.append(("job", status.job + (f", in Slurm's queue: {status.queue}" if status.queue else "")))
    if status.attempts:
        last = status.attempts[-1]
        train = f", {last.processes} of them train" if 0 < last.processes < last.devices else ""
        devices = f"; {last.devices} devices{train}" if last.devices else ""
        rows.append(("nodes", (f"{len(last.nodes)}: {' '.join(last.nodes)}" if last.nodes else UNKNOWN) + devices))
    return rows


def _attempt(attempt: Attempt) -> str:
    if attempt.ended is None:
        lasted, outcome = "", "no end"
    else:
        lasted, outcome = f" for {duration(max(0.0, attempt.ended - attempt.began))}", attempt.outcome or "ended"
    job = f"job {attempt.job}" + (f" restart {attempt.restart}" if attempt.restart else "")
    steps = f"from step {attempt.step}" + (f" to {attempt.ended_step}" if attempt.ended_step is not None else "")
    preempted = " (preempted)" if attempt.preempted else ""
    return f"{_clock(attempt.began)}{lasted}, {job}, {steps}: {outcome}{preempted}" + (f", {attempt.reason}" if attempt.reason else "")


def _progress(status: Status) -> str:
    if status.step is None:
        return UNKNOWN
    return f"{status.step}/{status.steps} {100 * status.step / status.steps:.1f}%" if status.steps else str(status.step)


def _goodput(status: Status) -> str:
    share = status.goodput.share if status.goodput else None
    return _or_unknown(share, lambda value: f"{100 * value:.1f}%")


def _of_what(status: Status) -> str:
    if status.goodput is None or status.goodput.share is None:
        return ""
    weighted = bool(status.attempts) and all(attempt.devices > 0 for attempt in status.attempts)
    spent = f"{duration(status.goodput.useful)} of {duration(status.goodput.allocated)}"
    return f": {spent}{' of device time' if weighted else ''}"


def _or_unknown(value: Any, show: Any) -> str:
    return UNKNOWN if value is None else show(value)


def _ago(when: float | None, now: float) -> str:
    return UNKNOWN if when is None else f"{duration(max(0.0, now - when))} ago"


def _clock(when: float) -> str:
    if not 0 <= when < 1e11:
        # No clock was ever so wrong: a damaged line.
        return UNKNOWN
    return datetime.fromtimestamp(when).strftime("%Y-%m-%d %H:%M:%S")


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]
