"""`python -m pretrain.status` on run directories written by the project's own writers, and on those of real runs."""

import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from pretrain.checkpoint.directory import CheckpointDirectory
from pretrain.config import PretrainConfig, dump_yaml
from pretrain.job import attempts
from pretrain.job.attempts import Attempt
from pretrain.lease import FOLDER, Owner
from pretrain.status import facts, lines, queue, state
from pretrain.status.__main__ import main
from pretrain.status.goodput import goodput
from pretrain.status.queue import Job
from pretrain.status.state import Status
from pretrain.tracking.journal import Journal
from pretrain.tracking.record import RunRecord
from tests.pretrain.finished import Finished
from tests.pretrain.killing import STEPS
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
OLD = {0: 90000.0, 10: 80040.0, 20: 80030.0, 30: 80020.0}


def _alive(run: Path, rows=ROWS, age: float = 490, **owner: object) -> None:
    write(run, rows)
    own(run, age, **owner)


def _tried(run: Path, *args, rows=OLD, status="RUNNING", **kwargs) -> None:
    write(run, rows, status=status)
    tried(run, *args, **kwargs)


WAITS = {"77": Job("77", "PENDING", "Priority")}
RUNS = {"77": Job("77", "RUNNING")}
STATES = {
    "training": (_alive, None, "training", ""),
    "training on another machine": (lambda run: _alive(run, machine="elsewhere", beat=15.0), None, "training", ""),
    "ending": (lambda run: _alive(run, {0: 500.0, 90: 400.0, 100: 300.0}), None, "training", "ending"),
    "starting": (lambda run: _alive(run, {0: 500.0}, age=60), None, "starting", ""),
    "starting again": (lambda run: _alive(run, OLD, age=60), None, "starting", ""),
    "starting for hours": (lambda run: _alive(run, OLD, age=9000), None, "stalled", "no step since the start"),
    "stalled": (
        lambda run: _alive(run, {step: age + 400 for step, age in ROWS.items()}, age=890), None, "stalled",
        "no line in the journal for 6m50s, behind step 40",
    ),
    "silent in its usual way": (lambda run: _alive(run, {0: 2900.0, 10: 2000.0, 20: 1000.0, 30: 900.0}, age=2800), None, "training", ""),
    "killed": (lambda run: _alive(run, pid=GONE), None, "dead", f"process {GONE} on "),
    "its machine lost": (lambda run: _alive(run, machine="elsewhere", host="node9", beat=400.0), None, "dead", "on node9"),
    "no heartbeat, but Slurm says that it runs": (
        lambda run: (_alive(run, machine="elsewhere", beat=400.0, job="77"), tried(run, 500)), RUNS, "stalled", "no heartbeat from process",
    ),
    "suspended": (
        lambda run: (_alive(run, machine="elsewhere", beat=400.0, job="77"), tried(run, 500)),
        {"77": Job("77", "SUSPENDED")}, "stalled", "Slurm: SUSPENDED",
    ),
    "killed and queued again": (lambda run: _tried(run, 90000), WAITS, "pending", "Slurm: PENDING (Priority)"),
    "to be started again": (lambda run: _tried(run, 90000, 80000, "again", "time is over"), None, "pending", "started again; time is over"),
    "queued again": (lambda run: _tried(run, 90000, 80000, "again"), WAITS, "pending", "Slurm: PENDING (Priority)"),
    "forgotten by Slurm": (lambda run: _tried(run, 90000, 80000, "again"), {}, "stopped", "job 77 is not in the queue any more"),
    "the job has begun": (lambda run: _tried(run, 60), RUNS, "starting", ""),
    "the job has begun, no Slurm here": (lambda run: _tried(run, 60), None, "starting", ""),
    "the job has begun and ended": (lambda run: _tried(run, 60), {}, "dead", "job 77 is gone without an end"),
    "the job is there for hours": (lambda run: _tried(run, 7200), RUNS, "stalled", "job 77 is there for 2h00m, and nobody trains"),
    "given up": (lambda run: _tried(run, 90000, 80000, "failed", "3 starts without a step"), WAITS, "failed", "3 starts without a step"),
    "stopped on purpose": (lambda run: _tried(run, 90000, 80000, "stopped"), None, "stopped", ""),
    "went on outside of Slurm": (lambda run: _tried(run, 99000, 95000, "failed", status="KILLED"), None, "stopped", ""),
    "killed by Slurm": (lambda run: _tried(run, 90000), {}, "dead", "job 77 is gone without an end"),
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


@pytest.fixture
def two(tmp_path, monkeypatch) -> Path:
    """./runs with one run that trains, one that waits, and something else."""
    _alive(tmp_path / "runs" / "a")
    _tried(tmp_path / "runs" / "b", 90000, 80000, "again", "time is over", preempted=True)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes" / "x.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_line_for_each_run(two, capsys):
    status, out, err = call(capsys)
    head, *found = out.splitlines()
    assert (status, err, len(found)) == (0, "", 2)
    assert head.split() == ["run", "state", "job", "step", "eta", "loss", "tok/s", "checkpoint", "restarts", "skipped", "goodput"]
    assert found[0].split()[:5] == ["runs/a", "training", "-", "40/100", "40.0%"]
    assert found[1].split()[:3] == ["runs/b", "pending", "77"] and found[1].endswith("to be started again; time is over")
    status, out, err = call(capsys, "runs/nowhere", "runs/b", "runs/notes", "runs/a")
    assert status == 2 and [line.split()[0] for line in out.splitlines()] == ["run", "runs/b", "runs/a"]
    assert "error: runs/nowhere cannot be read as a run directory (No such file or directory): name the output_dir of a run" in err
    assert "error: runs/notes is no run directory, since it holds none of run.json, metrics.jsonl" in err and len(err.splitlines()) == 2


def test_a_page_of_one_run(two, capsys):
    status, out, _ = call(capsys, "runs/b")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()[1:] if line.strip()}
    assert (
        status == 0
        and rows["state"].startswith("pending since ")
        and rows["state"].endswith("22h13m ago: to be started again; time is over")
    )
    assert rows["job"] == "77" and rows["nodes"] == "1: node1; 2 devices" and rows["MLflow"] == "13 unshipped points"
    assert rows["goodput"] == "0.3%: 1m00s of 5h33m of device time" and rows["skipped"] == "2 steps"
    assert rows["1"].endswith("for 2h46m, job 77, from step 0 to 10: again (preempted), time is over")


def test_json(two, capsys):
    journal = Journal(Path("runs/a/metrics.jsonl"))
    journal.append(50, metrics() | {"train/loss": float("nan")}, int(1000 * NOW))
    journal.close()
    status, out, _ = call(capsys, "--json", "runs/a", "runs/b", "runs/nowhere")
    found = json.loads(out, parse_constant=pytest.fail)
    assert status == 2 and len(found["errors"]) == 1 and [run["state"] for run in found["runs"]] == ["training", "pending"]
    assert found["runs"][0]["loss"] == "NaN" and found["runs"][0]["step"] == 50 and found["runs"][1]["attempts"][0]["job"] == "77"


def test_nothing_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = call(capsys)
    assert (status, out) == (2, "") and err == "error: there is no run directory in ./runs: name the output_dir of a run\n"
    monkeypatch.chdir(write(tmp_path / "run", ROWS, status="FAILED"))
    assert call(capsys)[1].splitlines()[1].split()[:2] == [str(tmp_path / "run"), "failed"]


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(b"\x00\xff\xfe" * 50 + b"\n"),
    "a list": lambda path: path.write_text("[1, 2]\n[3]\n"),
    "other types": lambda path: path.write_text(
        '{"format_version": 1, "event": "begin", "job": 7, "restart": "x", "began": "now", "step": [], "nodes": 5, "timestamp_ms": "x",'
        ' "since": 3, "train": {"steps": "many"}, "rollbacks": 3, "files": 4, "datasets": [], "artifacts": [], "experiment": 1,'
        ' "run_name": 2, "uri": 3}\n'
    ),
    "deep": lambda path: path.write_text("[" * 100_000 + "\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = [
    "config.yaml", "run.json", "metrics.jsonl", "slurm/attempts.jsonl", ".owner/000001.json", "checkpoints/step_00000030/files.json",
    "rollbacks.json", "metrics.discarded.jsonl", "system.jsonl", "shipped.json",
]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_told_at_most(name, tmp_path, capsys):
    for what, harm in DAMAGE.items():
        run = tmp_path / what
        _alive(run, pid=GONE)
        _publish(CheckpointDirectory(run / "checkpoints", keep_last=2), 30)
        tried(run, 500)
        (run / "rollbacks.json").write_text('{"format_version": 1, "rollbacks": []}')
        for more in ("metrics.discarded.jsonl", "system.jsonl", "shipped.json"):
            (run / more).write_text("{}\n")
        harm(run / name)
        status, out, err = call(capsys, run)
        assert (status, err) == (0, ""), what
        assert "state" in out and "goodput" in out
        if name in ("config.yaml", "run.json") and what != "other types":
            assert "problems" in out and name in out.partition("problems")[2], what
        assert call(capsys, run, "--json")[0] == 0


def test_help_is_quick_and_nothing_heavy_is_imported(two):
    """Processor time: the machine may be busy."""
    code = (
        "import sys; from pretrain.status.__main__ import main; assert main({}) == 0\n"
        "assert not {{'torch', 'mlflow', 'numpy', 'jsonargparse'}} & set(sys.modules), sorted(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    before = os.times()
    for arguments in ([], ["runs/b"], ["--json"]):
        subprocess.run([sys.executable, "-c", code.format(arguments)], check=True, capture_output=True, timeout=60, env=environment)
    subprocess.run([sys.executable, "-m", "pretrain.status", "--help"], check=True, capture_output=True, timeout=60, env=environment)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 4 * 2


def test_watching_ends_quietly(two):
    command = [sys.executable, "-m", "pretrain.status", "--watch", "0.2", "runs/b"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "60", "LINES": "10"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        seen = 0
        while seen < 3:
            seen += "pending since" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130 and err == "" and "\x1b" not in out
    # In a terminal in place, and no line longer than it.
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "pretrain.status", "--watch", "runs/b", "runs/a"]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env=environment) as process:
        shown = b""
        while b"\x1b[J" not in shown.partition(b"\x1b[H")[2]:
            shown += os.read(leader, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and process.stderr.read() == b""
    os.close(leader)
    os.close(follower)
    text = shown.decode().replace("\x1b[2J", "").replace("\x1b[H", "").replace("\x1b[K", "").replace("\x1b[J", "")
    assert [line.split()[0] for line in text.splitlines() if line.strip()] == ["run", "runs/b", "runs/a"]
    assert all(len(line) <= 60 for line in text.splitlines())


def test_wrong_times_to_watch_are_refused(capsys):
    for seconds in ("0", "-3", "nan", "1e9"):
        with pytest.raises(SystemExit) as caught:
            main([f"--watch={seconds}"])
        assert caught.value.code == 2 and f"{seconds} must lie between 0.2 and 86400 seconds" in capsys.readouterr().err


def test_a_real_run_that_has_finished(unbroken: Finished, capsys):
    status, out, _ = call(capsys, "--json", unbroken.folder / "run")
    (run,) = json.loads(out)["runs"]
    assert status == 0 and (run["state"], run["step"], run["steps"], run["checkpoint_step"]) == ("finished", STEPS, STEPS, STEPS)
    assert run["unshipped"] == run["restarts"] == run["skipped_steps"] == 0 and 0 < run["goodput"] < 1 and run["problems"] == []
    assert run["loss"] == unbroken.metrics[-1]["train/loss"] and run["validation_loss"] == unbroken.metrics[-1]["val/loss"]
