"""Useful over allocated time by numbers computed by hand, and how the journal is read for it."""

import dataclasses
import os
from pathlib import Path

from pretrain.job import attempts
from pretrain.job.attempts import Attempt
from pretrain.lease import FOLDER
from pretrain.status import facts, lines, state
from pretrain.status.goodput import goodput
from pretrain.status.queue import Job
from pretrain.tracking.journal import Journal
from pretrain.tracking.record import RunRecord
from tests.pretrain.written import NOW, look, metrics, own, write

T = 1_700_000_000.0


def _row(path: Path, step: int, when: float, step_time: float | None) -> None:
    journal = Journal(path)
    journal.append(step, {"x": 1.0} if step_time is None else {"perf/step_time_s": step_time, "experts/a": 0.5}, int(1000 * (T + when)))
    journal.close()


def test_goodput_by_hand(tmp_path):
    run, path = tmp_path, tmp_path / "metrics.jsonl"
    kept = [(0, 5, None), (10, 50, 3.0), (20, 90, float("nan")), (25, 95, 4.0), (27, 170, 9.0), (30, 250, 2.0), (40, 450, 4.0)]
    for step, when, step_time in kept:
        _row(path, step, when, step_time)
    _row(run / "metrics.discarded.jsonl", 50, 330, 2.0)
    trials = [
        Attempt(job="1", restart=0, began=T, step=0, devices=4, processes=4),
        Attempt(job="1", restart=1, began=T + 200, step=20, devices=8, processes=6),
        Attempt(job="1", restart=2, began=T + 400, step=30, devices=8, processes=8),
    ]
    for i, trial in enumerate(trials):
        attempts.begin(run, trial)
        if i == 0:
            attempts.end(run, dataclasses.replace(trial, ended=T + 100, outcome="again"))
    found = state.judge(facts.read(run, T + 500), {"1": Job("1", "RUNNING")}, T + 500)
    # Ended after 100 s on 4 devices: 10 steps of 3 s and 5 of 4 s; killed after its last sign at 330, of 8 devices 6 train: 3 steps of 2 s;
    # at work for 100 s: 10 steps of 4 s. Steps 26 and 27 were trained between the attempts, by somebody else.
    useful, allocated = 50 * 4 + 6 * 6 + 40 * 8, 100 * 4 + 130 * 8 + 100 * 8
    assert found.state == "starting" and (found.goodput.useful, found.goodput.allocated) == (useful, allocated)
    assert found.goodput.share == useful / allocated
    # Without devices nothing is weighted; killed at once without a sign, an attempt took no time.
    plain = [dataclasses.replace(trial, devices=0) for trial in trials[:2]]
    assert goodput(plain, [(T + 60, 30.0)], [T + 90], None) == goodput(plain, [(T + 60, 30.0)], [T + 90, T + 200], None)
    assert goodput(plain, [(T + 60, 30.0)], [T + 90], None).share == 30 / 90
    assert goodput(plain[:1], [], [], None).share is None


def test_goodput_outside_of_slurm(tmp_path):
    """From the start of the run to now, or to its end; unknown once it was restarted."""
    run = write(tmp_path / "run", {0: 100.0, 10: 80.0, 20: 60.0, 25: 40.0}, step_time=2.0)
    own(run, 100)
    assert look(run).goodput.share == 25 * 2 / 100
    write(run, {}, status="FINISHED")
    os.remove(run / FOLDER / "000001.json")
    record = RunRecord.load(run)
    record.started_ms = int(1000 * (NOW - 105))
    record.save(run)
    assert look(run).goodput.share == 25 * 2 / 100


def test_the_times_of_a_journal_that_lost_its_beginning(tmp_path):
    for step, when in ((500, 10), (510, 20), (505, 25)):
        _row(tmp_path / "metrics.jsonl", step, when, 2.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 520, "timestamp_ms": 17000000')
    assert list(lines.times(tmp_path / "metrics.jsonl")) == [(T + 10, 2.0), (T + 20, 20.0), (T + 25, 0.0)]
    assert [row["step"] for row in lines.tail(tmp_path / "metrics.jsonl")] == [500, 510, 505]
    assert lines.tail(tmp_path / "none") == []


def test_the_last_lines_of_a_long_journal(tmp_path):
    """Of which one is longer than what is read first."""
    journal = Journal(tmp_path / "metrics.jsonl")
    for step in range(200):
        journal.append(step, metrics())
    journal.append(200, {f"experts/{i}": 0.1 for i in range(30000)})
    journal.close()
    assert [row["step"] for row in lines.tail(journal.path)] == list(range(161, 201))
