"""In which state a run is, and its figures, by what lies in its directory and what Slurm says."""

import json
import os
import time
from pathlib import Path

import pytest

from pretrain.status import facts, queue, state
from pretrain.status.queue import Job
from pretrain.tracking.journal import Journal
from pretrain.tracking.record import RunRecord
from tests.pretrain.written import GONE, NOW, OLD, ROWS, alive, attempted, look, metrics, own, tried, write

WAITS = {"77": Job("77", "PENDING", "Priority")}
RUNS = {"77": Job("77", "RUNNING")}
STATES = {
    "training": (alive, None, "training", ""),
    "training on another machine": (lambda run: alive(run, machine="elsewhere", beat=15.0), None, "training", ""),
    "ending": (lambda run: alive(run, {0: 500.0, 90: 400.0, 100: 300.0}), None, "training", "ending"),
    "starting": (lambda run: alive(run, {0: 500.0}, age=60), None, "starting", ""),
    "starting again": (lambda run: alive(run, OLD, age=60), None, "starting", ""),
    "starting for hours": (lambda run: alive(run, OLD, age=9000), None, "stalled", "no step since the start"),
    "stalled": (
        lambda run: alive(run, {step: age + 400 for step, age in ROWS.items()}, age=890), None, "stalled",
        "no line in the journal for 6m50s, behind step 40",
    ),
    "silent in its usual way": (lambda run: alive(run, {0: 2900.0, 10: 2000.0, 20: 1000.0, 30: 900.0}, age=2800), None, "training", ""),
    "killed": (lambda run: alive(run, pid=GONE), None, "dead", f"process {GONE} on "),
    "its machine lost": (lambda run: alive(run, machine="elsewhere", host="node9", beat=400.0), None, "dead", "on node9"),
    "no heartbeat, but Slurm says that it runs": (
        lambda run: (alive(run, machine="elsewhere", beat=400.0, job="77"), tried(run, 500)), RUNS, "stalled", "no heartbeat from process",
    ),
    "suspended": (
        lambda run: (alive(run, machine="elsewhere", beat=400.0, job="77"), tried(run, 500)),
        {"77": Job("77", "SUSPENDED")}, "stalled", "Slurm: SUSPENDED",
    ),
    "killed and queued again": (lambda run: attempted(run, 90000), WAITS, "pending", "Slurm: PENDING (Priority)"),
    "to be started again": (lambda run: attempted(run, 90000, 80000, "again", "time is over"), None, "pending", "started again; time is"),
    "queued again": (lambda run: attempted(run, 90000, 80000, "again"), WAITS, "pending", "Slurm: PENDING (Priority)"),
    "forgotten by Slurm": (lambda run: attempted(run, 90000, 80000, "again"), {}, "stopped", "job 77 is not in the queue any more"),
    "goes on in the next element of its array": (
        lambda run: attempted(run, 90000, 80000, "again", chain="70"), {"70": Job("70", "PENDING", "JobArrayTaskLimit")}, "pending",
        "goes on in job 70, Slurm: PENDING (JobArrayTaskLimit)",
    ),
    "goes on in a successor": (
        lambda run: (
            attempted(run, 90000, 80000, "again", chain="77"),
            (run / "slurm/77.0").mkdir(),
            (run / "slurm/77.0/successor").write_text("78\n"),
        ),
        {"78": Job("78", "PENDING", "Dependency")}, "pending", "goes on in job 78, Slurm: PENDING (Dependency)",
    ),
    "the job has begun": (lambda run: attempted(run, 60), RUNS, "starting", ""),
    "the job has begun, no Slurm here": (lambda run: attempted(run, 60), None, "starting", ""),
    "the job has begun and ended": (lambda run: attempted(run, 60), {}, "dead", "job 77 is gone without an end"),
    "the job is there for hours": (lambda run: attempted(run, 7200), RUNS, "stalled", "job 77 is there for 2h00m, and nobody trains"),
    "given up": (lambda run: attempted(run, 90000, 80000, "failed", "3 starts without a step"), WAITS, "failed", "3 starts without a step"),
    "stopped on purpose": (lambda run: attempted(run, 90000, 80000, "stopped"), None, "stopped", ""),
    "went on outside of Slurm": (lambda run: attempted(run, 99000, 95000, "failed", status="KILLED"), None, "stopped", ""),
    "killed by Slurm": (lambda run: attempted(run, 90000), {}, "dead", "job 77 is gone without an end"),
    "finished": (lambda run: write(run, {0: 500.0, 100: 10.0}, status="FINISHED", checkpoint=100), None, "finished", ""),
    "killed after its last checkpoint": (
        lambda run: (write(run, {0: 500.0, 100: 10.0}, checkpoint=100), own(run, 500, pid=GONE)), None, "finished", "",
    ),
    "answered a signal": (lambda run: write(run, ROWS, status="KILLED", checkpoint=40), None, "stopped", ""),
    "failed": (lambda run: write(run, ROWS, status="FAILED"), None, "failed", ""),
    "killed without a lease": (lambda run: write(run, ROWS), None, "dead", "its process is gone without an end"),
    "without its record": (lambda run: write(run, ROWS, status=None), None, "stopped", ""),
    "new": (lambda run: write(run, {}, status=None), None, "new", ""),
    "empty": (Path.mkdir, None, "new", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_states(name, tmp_path):
    make, jobs, expected, note = STATES[name]
    make(tmp_path / "run")
    found = look(tmp_path / "run", jobs)
    assert (found.state, found.problems) == (expected, [])
    assert note in found.note and (note or not found.note)


def test_figures(tmp_path):
    run = write(tmp_path / "run", ROWS, checkpoint=30, step_time=0.9, **{"val/loss": 3.5})
    own(run, 45)
    found = look(run)
    # 30 steps in the 30 seconds between the lines of this process.
    assert (found.step, found.steps, found.eta_s, found.last_line) == (40, 100, 60.0, NOW - 10)
    assert (found.loss, found.validation_loss, found.tokens_per_s, found.skipped_steps) == (3.25, 3.5, 41234.0, 2)
    assert found.checkpoint_step == 30 and abs(found.checkpoint_time - time.time()) < 60
    # The only line of this process: the steps' own time.
    own(run, 12)
    assert look(run).eta_s == pytest.approx(54.0)
    # Expected between two lines: the shortest there is; five times the usual ones; twice the longest.
    read = facts.read(run, NOW)
    assert [state.expected_gap(read, times) for times in ([1.0, 2.0, 3.0], [0.0, 60.0, 120.0], [0.0, 10.0, 20.0, 200.0])] == [120, 300, 360]
    read.settings |= {"validation.interval": 5, "validation.samples": 80, "train.global_batch_size": 8}
    assert state.expected_gap(read, [1.0, 2.0]) == 129


def test_a_roll_back_is_life(tmp_path):
    """It cuts the journal back to lines of long ago, or to none of this process."""
    alive(tmp_path / "run", {0: 5000.0, 10: 4000.0, 20: 3990.0, 30: 3980.0}, age=4900)
    assert look(tmp_path / "run").state == "stalled"
    (tmp_path / "run" / "rollbacks.json").write_text(json.dumps({"format_version": 1, "rollbacks": []}))
    os.utime(tmp_path / "run" / "rollbacks.json", (NOW - 20, NOW - 20))
    assert look(tmp_path / "run").state == "training"
    alive(tmp_path / "other", {0: 5000.0}, age=4900)
    Journal(tmp_path / "other" / "metrics.discarded.jsonl").append(30, metrics(), int(1000 * (NOW - 30)))
    assert look(tmp_path / "other").state == "training"


def test_restarts_are_attempts_or_resumes(tmp_path):
    run = write(tmp_path / "run", ROWS)
    record = RunRecord.load(run)
    record.journal_bytes_at_resume = [100, 200, 300]
    record.save(run)
    entry = {"spike_begins": 3, "checkpoint_step": 2, "consumed_samples": 9}
    (run / "rollbacks.json").write_text(json.dumps({"format_version": 1, "rollbacks": [entry]}))
    found = look(run)
    assert (found.restarts, found.rollbacks, found.goodput) == (2, 1, None)
    for age in (500, 300):
        tried(run, age)
    assert look(run).restarts == 1


SQUEUE = """\
1201|PENDING|Resources|2026-11-24T10:00:00
1202|RUNNING|None|2026-11-23T09:00:00
1203|PENDING|(null)|N/A
1204|PENDING|ReqNodeNotAvail, UnavailableNodes:node[1-2]|N/A
1205|COMPLETED|None|2026-11-23T09:00:00
slurm_load_jobs error: something else
"""


def test_what_squeue_says():
    jobs = queue.parse(SQUEUE)
    assert list(jobs) == ["1201", "1202", "1203", "1204"]
    assert str(jobs["1201"]) == "PENDING (Resources), expected to start 2026-11-24T10:00:00" and str(jobs["1202"]) == "RUNNING"
    assert jobs["1204"].reason == "ReqNodeNotAvail, UnavailableNodes:node[1-2]" and jobs["1204"].start == ""
    assert queue.parse("") == {} and queue.ask([]) is None and queue.ask(["--help", "", "1;2"]) is None
