"""Runs whose process is gone: killed while it shipped, before it wrote its status, before its first checkpoint."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.tracking import Tracker, TrackingConfig, settle
from pretrain.tracking.record import RunRecord
from pretrain.tracking.store import connect
from tests.tracking.server import wait_for

STEPS = 50


def config(uri: str, **changes) -> TrackingConfig:
    return TrackingConfig(**{"experiment": "tests", "uri": uri, "system_metrics": False, "drain_timeout_s": 60.0, **changes})


def run_id(directory: Path) -> str:
    return (directory / "run_id").read_text().strip()


def status(uri: str, directory: Path) -> str:
    return connect(uri).get_run(run_id(directory)).info.status


def steps(uri: str, directory: Path) -> list[int]:
    return sorted(point.step for point in connect(uri).get_metric_history(run_id(directory), "train/loss"))


KILLED = f"""
import os, signal, sys, time
from pathlib import Path
from pretrain.tracking import Tracker, TrackingConfig
config = TrackingConfig(experiment="tests", uri=sys.argv[1], system_metrics=False)
tracker = Tracker(config, sys.argv[2], params={{"lr": 1}})
while not (Path(sys.argv[2]) / "shipped.json").exists():
    time.sleep(0.01)
for step in range({STEPS}):
    tracker.log({{"train/loss": 1 / (step + 1)}}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_run(uri: str, directory: Path) -> None:
    """A run that MLflow knows and whose process vanished after its last step."""
    result = subprocess.run([sys.executable, "-c", KILLED, uri, str(directory)], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert json.loads((directory / "run.json").read_text())["status"] == "RUNNING"


def test_a_complete_run_that_was_killed_without_a_word_is_settled(
    tmp_path: Path, database_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    killed_run(database_uri, directory)
    assert status(database_uri, directory) == "RUNNING"
    # Without a store in the settings the rest goes where the run was tracked, whatever the current directory is now.
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(directory)
    assert settle(config(""), directory)
    assert status(database_uri, directory) == "FINISHED" and steps(database_uri, directory) == list(range(STEPS))
    last_line = (directory / "metrics.jsonl").read_text().splitlines()[-1]
    assert RunRecord.load(directory).ended_ms == json.loads(last_line)["timestamp_ms"]
    assert connect(database_uri).get_run(run_id(directory)).info.end_time == json.loads(last_line)["timestamp_ms"]

    # With nothing missing no store is asked: this one would not answer.
    assert settle(config("http://127.0.0.1:9"), directory)
    assert not list(directory.glob("*.db"))


def test_a_drain_that_was_cut_off_is_settled(tmp_path: Path, database_uri: str) -> None:
    directory = tmp_path / "run"
    tracker = Tracker(config(database_uri, drain_timeout_s=0.0), directory, params={"lr": 1})
    for step in range(STEPS):
        tracker.log({"train/loss": 1 / (step + 1)}, step)
    tracker.close("KILLED")
    wait_for(lambda: not tracker._shipping.is_alive(), 60, "the thread to see the end of its time")
    assert not (directory / "run_id").exists() or status(database_uri, directory) == "RUNNING"
    assert settle(config(database_uri), directory)
    # What the run itself said of its end stays.
    assert status(database_uri, directory) == "KILLED" and steps(database_uri, directory) == list(range(STEPS))


@pytest.mark.parametrize("hangs", [False, True])
def test_a_store_that_does_not_answer_is_no_error_and_costs_little(tmp_path: Path, caplog: pytest.LogCaptureFixture, hangs: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        uri = f"http://127.0.0.1:{listener.getsockname()[1] if hangs else 9}"
        directory = tmp_path / "a run"
        tracker = Tracker(config(uri, enabled=False), directory, params={})
        tracker.log({"train/loss": 1.0}, 1)
        tracker.close()
        connect(uri)  # its import is not what is measured
        start = time.monotonic()
        assert not settle(config(uri, drain_timeout_s=1.0), directory)
        # MLflow itself would wait for 15 s.
        assert time.monotonic() - start < 12.0
    assert "1 points are only in" in caplog.text
    assert f"-m pretrain.tracking sync '{directory}'" in caplog.text
    assert settle(config(uri, enabled=False), directory)


def test_what_cannot_be_settled(tmp_path: Path, database_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    assert settle(config(database_uri), tmp_path / "nothing") and not (tmp_path / "nothing").exists()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    assert not settle(config(database_uri), tmp_path / "damaged")
    assert "run.json" in caplog.text

    live = tmp_path / "live"
    tracker = Tracker(config(database_uri), live, params={})
    wait_for(lambda: (live / "run_id").exists(), 60, "the run")
    assert not settle(config(database_uri), live)
    assert "being shipped by another process" in caplog.text and RunRecord.load(live).status == "RUNNING"
    tracker.close("FAILED")
    assert status(database_uri, live) == "FAILED"


def test_a_killed_run_that_is_started_anew_is_killed_in_mlflow(tmp_path: Path, database_uri: str) -> None:
    directory = tmp_path / "run"
    killed_run(database_uri, directory)
    (directory / "config.yaml").write_text("new")
    tracker = Tracker(config(database_uri), directory, params={"lr": 2}, artifacts=[directory / "config.yaml"])
    tracker.log({"train/loss": 2.0}, 1)
    tracker.close()
    previous = directory / "previous" / "1"
    assert run_id(previous) != run_id(directory)
    assert status(database_uri, previous) == "KILLED" and steps(database_uri, previous) == list(range(STEPS))
    assert status(database_uri, directory) == "FINISHED" and steps(database_uri, directory) == [1]


def test_the_end_of_an_earlier_run_reaches_mlflow_in_a_later_session(tmp_path: Path, database_uri: str) -> None:
    directory = tmp_path / "run"
    killed_run(database_uri, directory)
    Tracker(config(database_uri, enabled=False), directory, params={}).close()
    assert status(database_uri, directory / "previous" / "1") == "RUNNING"
    Tracker(config(database_uri), directory, params={}, resumed_from_step=0).close()
    assert status(database_uri, directory / "previous" / "1") == "KILLED"
