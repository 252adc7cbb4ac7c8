"""A tracking server that dies, comes back, or was never there: no point lost or doubled, no training time, no exit code."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from pretrain.tracking import Tracker, TrackingConfig
from pretrain.tracking.__main__ import main
from pretrain.tracking.store import connect
from tests.tracking.server import Server, wait_for

STEPS = 300


def config(uri: str, drain_timeout_s: float = 90.0) -> TrackingConfig:
    return TrackingConfig(experiment="outage", uri=uri, system_metrics=False, drain_timeout_s=drain_timeout_s)


def train(tracker: Tracker, steps: range) -> list[float]:
    """A loop of 1 ms steps; returns the seconds each `log` took."""
    latencies = []
    for step in steps:
        time.sleep(0.001)
        start = time.perf_counter()
        tracker.log({"train/loss": 1 / (step + 1), "train/tokens": 2048 * step}, step)
        latencies.append(time.perf_counter() - start)
    return latencies


def arrived(uri: str, directory: Path) -> list[tuple[int, float]]:
    points = connect(uri).get_metric_history((directory / "run_id").read_text().strip(), "train/loss")
    return sorted((point.step, point.value) for point in points)


EXPECTED = [(step, 1 / (step + 1)) for step in range(STEPS)]


def test_server_killed_and_started_again(tmp_path: Path, server: Server) -> None:
    directory = tmp_path / "run"
    server.start()
    tracker = Tracker(config(server.uri), directory, params={"lr": 1e-3})
    train(tracker, range(100))
    wait_for(lambda: (directory / "run_id").exists() and len(arrived(server.uri, directory)) == 100, 60, "the first 100 steps")
    server.kill()
    latencies = train(tracker, range(100, 200))
    assert statistics.median(latencies) < 0.001
    server.start()
    train(tracker, range(200, STEPS))
    tracker.close("FINISHED")
    assert arrived(server.uri, directory) == EXPECTED
    client = connect(server.uri)
    run = client.get_run((directory / "run_id").read_text().strip())
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "0.001"}
    assert len(client.search_runs([run.info.experiment_id])) == 1


UNTRACKED = """
import sys, time
from pretrain.tracking import Tracker, TrackingConfig
config = TrackingConfig(experiment="outage", uri=sys.argv[1], system_metrics=False, drain_timeout_s=2.0)
tracker = Tracker(config, sys.argv[2], params={"lr": 1})
for step in range(300):
    tracker.log({"train/loss": 1 / (step + 1), "train/tokens": 2048 * step}, step)
start = time.monotonic()
tracker.close("FINISHED")
print(time.monotonic() - start)
"""


def test_no_server_at_the_start(tmp_path: Path, server: Server) -> None:
    """Two runs start without a server: one ends before it appears and is synced, the other one's thread ships it."""
    early, late = tmp_path / "early", tmp_path / "late"
    result = subprocess.run([sys.executable, "-c", UNTRACKED, server.uri, str(early)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 20, "it waited for TrackingConfig's 30 s instead of its own 2"
    assert "Traceback" not in result.stderr
    assert f"600 points are only in {early}" in result.stderr and f"-m pretrain.tracking sync {early}" in result.stderr
    assert main(["sync", str(early)]) == 1

    tracker = Tracker(config(server.uri), late, params={"lr": 1})
    latencies = train(tracker, range(STEPS))
    assert statistics.median(latencies) < 0.001
    assert not (late / "run_id").exists()
    server.start()
    wait_for(lambda: (late / "run_id").exists() and len(arrived(server.uri, late)) == STEPS, 90, "the thread to ship the journal")
    tracker.close("FINISHED")
    assert arrived(server.uri, late) == EXPECTED

    for _ in range(2):
        assert main(["sync", str(early)]) == 0
        assert arrived(server.uri, early) == EXPECTED
    statuses = {run.info.run_name: run.info.status for run in connect(server.uri).search_runs(["1"])}
    assert statuses == {"early": "FINISHED", "late": "FINISHED"}
