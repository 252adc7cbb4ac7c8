"""`python -m pretrain.status`: a table, a page, JSON, watching; damaged directories and those of real runs."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.checkpoint.directory import CheckpointDirectory
from pretrain.status.__main__ import main
from pretrain.tracking.journal import Journal
from tests.pretrain.finished import Finished
from tests.pretrain.killing import STEPS
from tests.pretrain.test_checkpoints import _publish
from tests.pretrain.written import GONE, NOW, ROWS, alive, attempted, metrics, tried, write


@pytest.fixture
def two(tmp_path, monkeypatch) -> Path:
    """./runs with one run that trains, one that waits, and something else; the command looks at them at NOW."""
    alive(tmp_path / "runs" / "a")
    attempted(tmp_path / "runs" / "b", 90000, 80000, "again", "time is over", preempted=True)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes" / "x.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pretrain.status.__main__.time", SimpleNamespace(time=lambda: NOW))
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


@pytest.mark.parametrize(
    "damage", ['"train/skipped_steps": NaN', '"train/skipped_steps": Infinity', '"timestamp_ms": 1' + "0" * 40, '"step": 1' + "0" * 400]
)
def test_numbers_that_nobody_would_write_hide_no_other_run(two, capsys, damage):
    journal = two / "runs" / "b" / "metrics.jsonl"
    last = json.loads(journal.read_text().splitlines()[-1])
    name = damage.partition('"')[2].partition('"')[0]
    with journal.open("a") as file:
        file.write(json.dumps({**last, name: None}).replace(f'"{name}": null', damage) + "\n")
    for arguments in ((), ("runs/b",), ("--json",)):
        _, out, _ = call(capsys, *arguments)
        assert "runs/a" in out or arguments == ("runs/b",)


def test_a_page_of_one_run(two, capsys):
    status, out, _ = call(capsys, "runs/b")
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines()[1:] if line.strip()}
    assert status == 0 and rows["state"].startswith("pending since ")
    assert rows["state"].endswith("22h13m ago: to be started again; time is over")
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
    # As in a checkout of this project.
    (tmp_path / "slurm").mkdir()
    status, out, err = call(capsys)
    assert (status, out) == (2, "") and err == "error: there is no run directory in ./runs: name the output_dir of a run\n"
    monkeypatch.setenv("QSPARSE_RUNS", str(tmp_path / "elsewhere"))
    assert call(capsys)[2] == f"error: there is no run directory in {tmp_path / 'elsewhere'}: name the output_dir of a run\n"
    write(tmp_path / "elsewhere" / "a", ROWS)
    assert [line.split()[0] for line in call(capsys)[1].splitlines()] == ["run", str(tmp_path / "elsewhere" / "a")]
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
        alive(run, pid=GONE)
        _publish(CheckpointDirectory(run / "checkpoints", keep_last=2), 30)
        tried(run, 500)
        (run / "rollbacks.json").write_text('{"format_version": 1, "rollbacks": []}')
        for more in ("metrics.discarded.jsonl", "system.jsonl", "shipped.json"):
            (run / more).write_text("{}\n")
        harm(run / name)
        status, out, err = call(capsys, run)
        assert (status, err) == (0, ""), what
        assert "state" in out and "goodput" in out
        # Half a YAML file may be a whole one.
        if name in ("config.yaml", "run.json") and what != "other types" and (name, what) != ("config.yaml", "cut"):
            assert name in out.partition("problems")[2], what


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
    # A shell's background jobs, such as these tests may be, ignore it.
    ended_by_int = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **ended_by_int) as process:
        seen = 0
        while seen < 3:
            seen += "pending since" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130 and err == "" and "\x1b" not in out
    # In a terminal in place, and no line longer than it.
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "pretrain.status", "--watch", "runs/b", "runs/a"]
    with subprocess.Popen(command, stdout=follower, stderr=subprocess.PIPE, env=environment, **ended_by_int) as process:
        shown = b""
        while b"\x1b[J" not in shown.partition(b"\x1b[H")[2]:
            shown += os.read(leader, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and process.stderr.read() == b""
    os.close(leader)
    os.close(follower)
    first, _, _ = shown.partition(b"\x1b[J")
    text = first.decode().replace("\x1b[2J", "").replace("\x1b[H", "").replace("\x1b[K", "")
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
