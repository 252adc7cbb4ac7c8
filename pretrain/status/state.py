"""What follows from the facts: in which state a run is, and the figures that are shown of it."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.job.attempts import Attempt
from pretrain.status.facts import Facts
from pretrain.status.goodput import Goodput, goodput
from pretrain.status.lines import number
from pretrain.status.queue import SUSPENDED, WAITING, Job
from pretrain.words import duration

State = Literal["training", "pending", "starting", "stalled", "stopped", "failed", "finished", "dead", "new"]
OUTCOMES: dict[str, State] = {"finished": "finished", "stopped": "stopped", "failed": "failed"}
"""Of an attempt."""
STATUSES: dict[str, State] = {"FINISHED": "finished", "KILLED": "stopped", "FAILED": "failed"}
"""Of run.json. KILLED: by a signal, which the run has answered."""
START_S = 1800.0
"""That a start may take: importing, building, loading, compiling, the first steps; as train.hang_timeout_s allows."""
END_S = 900.0
"""That the end may take behind the last step: a checkpoint, MLflow."""
LEAST_S = 120.0
"""Without a line that is nothing unusual, however quick the steps are: a checkpoint is written, a file system is slow."""


@dataclass(kw_only=True)
class Status:
    """One run; None where it is not known. Times are in seconds since the epoch."""

    directory: Path
    state: State
    since: float | None
    note: str
    """Why, or what to know besides; "" where the state says it all."""
    job: str
    """Slurm's number; "" outside of it."""
    queue: Job | None
    step: int | None
    steps: int | None
    eta_s: float | None
    loss: float | None
    validation_loss: float | None
    tokens_per_s: float | None
    step_time_s: float | None
    last_line: float | None
    checkpoint_step: int | None
    checkpoint_time: float | None
    restarts: int
    rollbacks: int
    skipped_steps: int | None
    goodput: Goodput | None
    unshipped: int | None
    attempts: list[Attempt]
    problems: list[str]


def judge(facts: Facts, queue: Mapping[str, Job] | None, now: float) -> Status:
    """queue: the jobs in Slurm's queue; None where nothing is known of it."""
    attempt = _last_attempt(facts)
    job = number_of_job(facts)
    state, since, note = _state(facts, attempt, job, queue, now)
    rows = [row for row in facts.rows if number(row, "train/loss") is not None]
    last = rows[-1] if rows else None
    validated = next((row for row in reversed(rows) if number(row, "val/loss") is not None), None)
    step = last["step"] if last else facts.checkpoint_step
    resumes = len(facts.record.journal_bytes_at_resume) if facts.record else 0
    # A roll-back within a process takes the record up again as a restart does.
    restarts = len(facts.attempts) - 1 if facts.attempts else max(0, resumes - facts.rollbacks)
    skipped = number(last, "train/skipped_steps")
    return Status(
        directory=facts.directory, state=state, since=since, note=note, job=job, queue=(queue or {}).get(job), step=step, steps=facts.steps,
        eta_s=_eta(facts, rows) if state == "training" else None, loss=number(last, "train/loss"),
        validation_loss=number(validated, "val/loss"), tokens_per_s=number(last, "perf/tokens_per_s"),
        step_time_s=number(last, "perf/step_time_s"), last_line=last["timestamp_ms"] / 1000 if last else None,
        checkpoint_step=facts.checkpoint_step, checkpoint_time=facts.checkpoint_time, restarts=restarts, rollbacks=facts.rollbacks,
        skipped_steps=None if skipped is None or not math.isfinite(skipped) else int(skipped),
        goodput=_goodput(facts, restarts, state in ("training", "starting", "stalled"), now), unshipped=facts.unshipped,
        attempts=facts.attempts, problems=facts.problems,
    )  # fmt: skip


def number_of_job(facts: Facts) -> str:
    """The job that owns the run, or tried it last; "" outside of Slurm."""
    attempt = _last_attempt(facts)
    return facts.owner.job if facts.alive and facts.owner else attempt.job if attempt else facts.owner.job if facts.owner else ""


def _last_attempt(facts: Facts) -> Attempt | None:
    """None where the run went on outside of Slurm afterwards."""
    last = facts.attempts[-1] if facts.attempts else None
    after = facts.rows[-1]["timestamp_ms"] / 1000 if facts.rows else 0.0
    return None if last is not None and last.ended is not None and after > last.ended + 1 else last


def _state(facts: Facts, attempt: Attempt | None, job: str, queue: Mapping[str, Job] | None, now: float) -> tuple[State, float | None, str]:
    """(state, since when, note)"""
    if facts.alive:
        return _at_work(facts, now)
    ended = _ended(facts, attempt)
    if facts.steps and facts.checkpoint_step is not None and facts.checkpoint_step >= facts.steps:
        return "finished", ended, ""
    queued = (queue or {}).get(job)
    if queued is not None and queued.state in WAITING and not (attempt and attempt.outcome in OUTCOMES):
        return "pending", ended, f"Slurm: {queued}"
    following = next((found for number in facts.successors if (found := (queue or {}).get(number))), None)
    if attempt is not None and attempt.outcome == "again" and following is not None:
        return "pending", ended, f"goes on in job {following.number}, Slurm: {following}"
    if attempt is not None and attempt.ended is not None:
        return _by_account(attempt, gone=queue is not None and queued is None)
    if attempt is not None and (queued is not None or queue is None) and _is_new(facts, attempt):
        # The processes have not come as far as to own the directory.
        if now - attempt.began < START_S:
            return "starting", attempt.began, ""
        if queued is not None:
            return "stalled", attempt.began, f"job {job} is there for {duration(now - attempt.began)}, and nobody trains"
    if queued is not None:
        why = f"Slurm: {queued}" if queued.state in SUSPENDED else f"no heartbeat from {facts.owner}" if facts.owner else "nobody trains"
        return "stalled", ended, why
    if attempt is None and facts.owner is None and facts.record is not None and facts.record.status in STATUSES:
        return STATUSES[facts.record.status], ended, ""
    if attempt is None and facts.owner is None and facts.record is None:
        return ("stopped" if facts.rows or facts.checkpoint_step is not None else "new"), ended, ""
    return "dead", ended, f"{facts.owner or (f'job {job}' if job else 'its process')} is gone without an end"


def _by_account(attempt: Attempt, gone: bool) -> tuple[State, float | None, str]:
    """Of an attempt that has ended. gone: its job is not in the queue, which is known."""
    if attempt.outcome in OUTCOMES:
        return OUTCOMES[attempt.outcome], attempt.ended, attempt.reason
    if gone:
        return "stopped", attempt.ended, f"was to be started again, but job {attempt.job} is not in the queue any more; {attempt.reason}"
    return "pending", attempt.ended, f"to be started again; {attempt.reason}"


def _is_new(facts: Facts, attempt: Attempt) -> bool:
    """Whether the owner that was left belongs to an earlier attempt."""
    return facts.began is None or facts.began < attempt.began


def _at_work(facts: Facts, now: float) -> tuple[State, float | None, str]:
    began = facts.began or 0.0
    times = [row["timestamp_ms"] / 1000 for row in facts.rows if number(row, "train/loss") is not None]
    # Owners tell whole seconds.
    own = [when for when in times if when >= began - 1]
    # What a roll-back has thrown away was life all the same.
    last = max([*own, *(sign for sign in facts.thrown_away if began - 1 <= sign <= now)], default=None)
    if last is None:
        waited = now - began
        return ("starting" if waited < START_S else "stalled"), began, "" if waited < START_S else "no step since the start"
    silent, step = now - last, facts.rows[-1]["step"] if facts.rows else 0
    ends = facts.steps is not None and step >= facts.steps
    if silent <= (END_S if ends else expected_gap(facts, own) if own else START_S):
        return "training", began, "ending" if ends else ""
    return "stalled", last, f"no line in the journal for {duration(silent)}, behind step {step}"


def expected_gap(facts: Facts, times: list[float]) -> float:
    """Seconds between two lines that are nothing unusual yet. times: of this process's last lines.

    Five times the usual ones, or twice the longest: that had a validation or a checkpoint in it, where such have come. Room for a first
    validation besides, at the pace of training.
    """
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    step_time = number(facts.rows[-1], "perf/step_time_s") or 0.0
    usual = statistics.median(gaps) if gaps else facts.whole("train.log_interval", 1) * step_time
    validation = facts.whole("validation.samples", 0) / max(1, facts.whole("train.global_batch_size", 1)) * step_time
    return max(LEAST_S, 5 * usual, 2 * max(gaps, default=0.0)) + (validation if facts.whole("validation.interval", 0) else 0.0)


def _ended(facts: Facts, attempt: Attempt | None) -> float | None:
    if attempt is not None and attempt.ended is not None:
        return attempt.ended
    if facts.record is not None and facts.record.ended_ms and facts.owner is None:
        return facts.record.ended_ms / 1000
    return max([*facts.signs, *(row["timestamp_ms"] / 1000 for row in facts.rows[-1:])], default=None)


def _eta(facts: Facts, rows: list[dict]) -> float | None:
    """By the clock, so that validations and checkpoints are in it; by the steps' own time where this process has only one line."""
    if not rows or facts.steps is None:
        return None
    own = [row for row in rows if row["timestamp_ms"] / 1000 >= (facts.began or 0.0) - 1] or rows[-1:]
    steps = own[-1]["step"] - own[0]["step"]
    pace = (own[-1]["timestamp_ms"] - own[0]["timestamp_ms"]) / 1000 / steps if steps > 0 else number(rows[-1], "perf/step_time_s")
    return None if pace is None else max(0.0, (facts.steps - rows[-1]["step"]) * pace)


def _goodput(facts: Facts, restarts: int, at_work: bool, now: float) -> Goodput | None:
    attempts = facts.attempts
    if not attempts:
        if facts.record is None or restarts or not facts.record.started_ms:
            return None
        ended = facts.record.ended_ms / 1000 if facts.record.ended_ms and not facts.alive else None
        attempts = [Attempt(job="", restart=0, began=facts.record.started_ms / 1000, step=0, ended=ended)]
    return goodput(attempts, facts.lines, facts.signs, now if at_work else None)
