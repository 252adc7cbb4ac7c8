"""Run directories in every state, written by the project's own writers."""

import dataclasses
import os
import time
from datetime import datetime
from pathlib import Path

from pretrain.checkpoint.directory import CheckpointDirectory
from pretrain.config import PretrainConfig, dump_yaml
from pretrain.job import attempts
from pretrain.job.attempts import Attempt
from pretrain.lease import FOLDER, Owner
from pretrain.status import facts, state
from pretrain.status.queue import Job
from pretrain.status.state import Status
from pretrain.tracking.journal import Journal
from pretrain.tracking.record import RunRecord
from tests.pretrain.test_checkpoints import _publish

NOW = float(int(time.time()))
GONE = 2**22
"""No process has such a number (pid_max)."""


def metrics(step_time: float = 1.0, **more: float) -> dict[str, float]:
    return {"train/loss": 3.25, "train/skipped_steps": 2, "perf/tokens_per_s": 41234.0, "perf/step_time_s": step_time} | more


def write(
    run: Path, rows: dict[int, float], steps: int = 100, status: str | None = "RUNNING", checkpoint: int | None = None, **more: float
) -> Path:
    """A run that has logged these steps so many seconds ago. status: of run.json, None for no run.json."""
    run.mkdir(parents=True, exist_ok=True)
    config = PretrainConfig()
    config.train.steps, config.output_dir = steps, str(run)
    (run / "config.yaml").write_text(dump_yaml(config))
    if rows:
        journal = Journal(run / "metrics.jsonl")
        for step, age in rows.items():
            journal.append(step, metrics(**more) if step else {"model/parameters": 5}, int(1000 * (NOW - age)))
        journal.close()
    if status is not None:
        record = RunRecord(experiment="e", run_name="r", uri="", started_ms=int(1000 * (NOW - max(rows.values(), default=0.0))))
        if status != "RUNNING":
            record.end(status, int(1000 * (NOW - 5)))
        record.save(run)
    if checkpoint is not None:
        _publish(CheckpointDirectory(run / "checkpoints", keep_last=2), checkpoint)
    return run


def own(run: Path, age: float, beat: float = 0.0, **changes: object) -> None:
    """The lease of a process that began so long ago, and whose last heartbeat is `beat` old."""
    since = datetime.fromtimestamp(NOW - age).astimezone().isoformat(timespec="seconds")
    (run / FOLDER).mkdir(exist_ok=True)
    path = run / FOLDER / "000001.json"
    path.write_bytes(dataclasses.replace(Owner.here(), since=since, **changes).encode())
    os.utime(path, (NOW - beat, NOW - beat))


def tried(run: Path, age: float, ended: float | None = None, outcome: str = "", reason: str = "", **changes) -> None:
    """An attempt of job 77."""
    attempt = Attempt(job="77", restart=0, began=NOW - age, step=0, nodes=["node1"], devices=2, processes=2)
    attempt = dataclasses.replace(attempt, **changes)
    attempts.begin(run, attempt)
    if ended is not None:
        attempts.end(run, dataclasses.replace(attempt, ended=NOW - ended, ended_step=10, outcome=outcome, reason=reason))


def look(run: Path, jobs: dict[str, Job] | None = None, now: float = NOW) -> Status:
    return state.judge(facts.read(run, now), jobs, now)


ROWS = {0: 500.0, 10: 40.0, 20: 30.0, 30: 20.0, 40: 10.0}
"""step -> seconds since it was logged."""
OLD = {0: 90000.0, 10: 80040.0, 20: 80030.0, 30: 80020.0}


def alive(run: Path, rows=ROWS, age: float = 490, **owner: object) -> None:
    """A run with an owner that began so long ago."""
    write(run, rows)
    own(run, age, **owner)


def attempted(run: Path, *args, rows=OLD, status="RUNNING", **kwargs) -> None:
    """A run that nobody owns, and a job's attempt at it (`tried`)."""
    write(run, rows, status=status)
    tried(run, *args, **kwargs)
