"""The Tracker against a real sqlite store: what arrives, resuming, statuses, refusals."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.tracking import DatasetInput, Tracker, TrackingConfig, collect_environment, read_journal, validate_uri
from pretrain.tracking.__main__ import main
from pretrain.tracking.store import connect, resolve_uri
from pretrain.tracking.system import SystemSampler
from tests.tracking.server import wait_for


def config(uri: str, **changes) -> TrackingConfig:
    return TrackingConfig(**{"experiment": "tests", "uri": uri, "system_metrics": False, "drain_timeout_s": 60.0, **changes})


def run_id(directory: Path) -> str:
    return (directory / "run_id").read_text().strip()


def history(uri: str, directory: Path, metric: str) -> list[tuple[int, float]]:
    points = connect(uri).get_metric_history(run_id(directory), metric)
    return sorted((point.step, point.value) for point in points)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run waits for MLflow as long as any other: the disk may be busy."""
    monkeypatch.setattr("pretrain.tracking.tracker.KILLED_DRAIN_S", 60.0)


def test_everything_about_a_run_arrives(tmp_path: Path, database_uri: str) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.yaml").write_text("train: {steps: 3}\n")
    tracker = Tracker(
        config(database_uri, system_metrics=True, tags={"comparison": "c1"}),
        directory,
        params={"qsparse.keep": 0.4, "bitnet.enabled": True, "long": "x" * 9000},
        tags=collect_environment(),
        datasets=[DatasetInput(name="shards", digest="ab" * 32, source="shards/manifest.json", context="training")],
        artifacts=[directory / "config.yaml"],
    )
    tracker.log({"train/loss": 1 / 3, "train/tokens": 2**40, "layer[3]/norm": 1.5}, step=1)
    tracker.log({"train/loss": math.nan, "train/grad_norm": math.inf}, step=2)
    tracker.log({"train/loss": 0.25, "moe/load_max": 0.5, "experts/layers.0.3/load": 0.5}, step=3)
    tracker.close("FINISHED")

    client = connect(database_uri)
    run = client.get_run(run_id(directory))
    loss = sorted(client.get_metric_history(run.info.run_id, "train/loss"), key=lambda point: point.step)
    rows = read_journal(directory / "metrics.jsonl")
    assert [point.step for point in loss] == [1, 2, 3]
    assert [point.timestamp for point in loss] == [row["timestamp_ms"] for row in rows]
    assert loss[0].value == 1 / 3 and math.isnan(loss[1].value) and loss[2].value == 0.25
    # Tables of experts stay in the journal.
    assert rows[2]["experts/layers.0.3/load"] == 0.5 and "moe/load_max" in run.data.metrics
    assert not any("experts" in name for name in run.data.metrics)
    assert history(database_uri, directory, "train/tokens") == [(1, float(2**40))]
    assert history(database_uri, directory, "layer_3_/norm") == [(1, 1.5)]
    assert history(database_uri, directory, "train/grad_norm")[0][1] > 1e308
    assert history(database_uri, directory, "system/process_memory_megabytes")[0][1] > 10
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["qsparse.keep"] == "0.4" and run.data.params["bitnet.enabled"] == "True"
    assert len(run.data.params["long"]) == 6000
    assert run.data.tags["comparison"] == "c1" and run.data.tags["version.mlflow"] and run.data.tags["hostname"]
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "shards" and "ab" * 32 in dataset.dataset.profile and dataset.tags[0].value == "training"
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert all(set(row) >= {"step", "timestamp_ms"} for row in rows) and len(rows) == 3


def test_resume_goes_on_with_the_same_run(tmp_path: Path, database_uri: str, patient: None) -> None:
    directory, client = tmp_path / "run", connect(database_uri)
    tracker = Tracker(config(database_uri), directory, params={"lr": 0.1, "steps": 10, "gone": 1})
    for step in range(1, 8):
        tracker.log({"train/loss": 1 / step, "perf/tokens_per_s": 100.0 + step}, step)
    tracker.close("KILLED")
    first = run_id(directory)
    killed = client.get_run(first).info
    assert killed.status == "KILLED" and killed.end_time

    settings = {"params": {"lr": 0.2, "steps": 10, "new": "yes"}, "resumed_from_step": 4}
    tracker = Tracker(config(database_uri), directory, **settings)
    assert [row["step"] for row in read_journal(directory / "metrics.jsonl")] == [1, 2, 3, 4]
    wait_for(lambda: client.get_run(first).info.status == "RUNNING", 60, "the status RUNNING")
    for step in range(5, 11):
        tracker.log({"train/loss": 1 / step, "perf/tokens_per_s": 200.0 + step}, step)
    tracker.close("FINISHED")

    run = client.get_run(first)
    assert run_id(directory) == first and run.info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id])) == 1
    # Bit-equal losses of the repeated steps 5 to 7 are there once; their speeds differ and are there twice, newest last.
    assert history(database_uri, directory, "train/loss") == [(step, 1 / step) for step in range(1, 11)]
    speeds = client.get_metric_history(first, "perf/tokens_per_s")
    assert sorted(point.step for point in speeds) == [1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10]
    assert max((point for point in speeds if point.step == 6), key=lambda point: point.timestamp).value == 206.0
    assert run.data.params == {"lr": "0.1", "steps": "10", "gone": "1", "new": "yes"}
    assert run.data.tags["resume.1.lr"] == "0.2" and run.data.tags["resume.1.from_step"] == "4"
    assert run.data.tags["resume.1.gone"] == "(absent)" and "resume.1.steps" not in run.data.tags

    Tracker(config(database_uri), directory, **{**settings, "resumed_from_step": 10}).close()
    tags = client.get_run(first).data.tags
    assert tags["resume.2.from_step"] == "10" and "resume.2.lr" not in tags


def test_a_start_without_resume_makes_a_new_run_and_keeps_the_old_files(tmp_path: Path, database_uri: str) -> None:
    directory = tmp_path / "run"
    for loss in (1.0, 2.0):
        tracker = Tracker(config(database_uri), directory, params={"lr": loss})
        tracker.log({"train/loss": loss}, 1)
        tracker.close()
    assert history(database_uri, directory, "train/loss") == [(1, 2.0)]
    assert history(database_uri, directory / "previous" / "1", "train/loss") == [(1, 1.0)]


def test_the_oldest_of_several_earlier_runs_may_be_removed(tmp_path: Path, database_uri: str) -> None:
    directory = tmp_path / "run"
    for number in range(4):
        Tracker(config(database_uri, enabled=False), directory, params={"number": number}).close()
        if number == 2:
            shutil.rmtree(directory / "previous" / "1")
    assert sorted(path.name for path in (directory / "previous").iterdir()) == ["2", "3"]


def test_a_resumed_run_may_get_another_name_but_no_other_experiment(
    tmp_path: Path, database_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    Tracker(config(database_uri), directory, params={}).close()
    Tracker(config(database_uri, run_name="better", experiment="others"), directory, params={}, resumed_from_step=0).close()
    assert connect(database_uri).get_run(run_id(directory)).info.run_name == "better"
    assert "tracking.experiment=others: the run stays in tests, where it was begun" in caplog.text
    Tracker(config(database_uri), directory, params={}, resumed_from_step=0).close()
    assert connect(database_uri).get_run(run_id(directory)).info.run_name == "better"


def test_samples_go_on_behind_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "system.jsonl"
    path.write_bytes(b'{"step": 4, "timestamp_ms": 1, "a": 2}\n' + bytes(64) + b'\n{"step": 5, "timestamp_ms": 2, "a": 2}\n')
    sampler = SystemSampler(path, 60.0)
    wait_for(lambda: path.read_bytes().count(b"\n") == 4, 30, "a sample")
    sampler.stop()
    assert b'{"step": 6, ' in path.read_bytes().splitlines()[-1]


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_statuses_arrive(tmp_path: Path, database_uri: str, patient: None, status: str) -> None:
    tracker = Tracker(config(database_uri), tmp_path / "run", params={})
    tracker.close(status)
    tracker.close("FINISHED")
    assert connect(database_uri).get_run(run_id(tmp_path / "run")).info.status == status


def test_an_unknown_status_is_an_error(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(enabled=False, system_metrics=False), tmp_path / "run", params={})
    with pytest.raises(ValueError, match="DONE"):
        tracker.close("DONE")
    tracker.close()


CRASHING = """
import sys
from pretrain.tracking import Tracker, TrackingConfig
tracker = Tracker(TrackingConfig(experiment="tests", uri=sys.argv[1], system_metrics=False), sys.argv[2], params={})
tracker.log({"train/loss": 1.0}, 1)
raise RuntimeError("training broke")
"""


def test_a_process_that_leaves_without_closing_has_failed(tmp_path: Path, database_uri: str) -> None:
    command = [sys.executable, "-c", CRASHING, database_uri, str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "training broke" in result.stderr
    assert connect(database_uri).get_run(run_id(tmp_path / "run")).info.status == "FAILED"
    assert history(database_uri, tmp_path / "run", "train/loss") == [(1, 1.0)]


def test_without_shipping_the_journal_is_written_and_sync_ships_it(
    tmp_path: Path, database_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    tracker = Tracker(config(database_uri, enabled=False), directory, params={"lr": 1})
    for step in range(1500):
        tracker.log({"train/loss": 1 / (step + 1), "train/lr": step * 1e-3}, step)
    tracker.close("FINISHED")
    assert not (directory / "run_id").exists()
    assert main(["status", str(directory)]) == 0
    assert "3,000 points unshipped" in capsys.readouterr().out

    assert main(["sync", str(directory)]) == 0
    assert "3,000 points shipped" in capsys.readouterr().out
    once = history(database_uri, directory, "train/loss")
    assert once == [(step, 1 / (step + 1)) for step in range(1500)]
    assert main(["sync", str(directory)]) == 0
    assert "nothing new" in capsys.readouterr().out
    (directory / "shipped.json").unlink()
    assert main(["sync", str(directory)]) == 0
    assert history(database_uri, directory, "train/loss") == once
    run = connect(database_uri).get_run(run_id(directory))
    assert len(connect(database_uri).search_runs([run.info.experiment_id])) == 1
    assert run.info.status == "FINISHED" and run.data.params == {"lr": "1"}
    main(["status", str(directory)])
    assert "FINISHED (shipped)" in (shown := capsys.readouterr().out) and " 0 points unshipped" in shown


def test_sync_to_another_store_makes_the_run_there(tmp_path: Path, database_uri: str, empty_database: Path) -> None:
    directory = tmp_path / "run"
    tracker = Tracker(config(database_uri), directory, params={"lr": 1})
    tracker.log({"train/loss": 0.5}, 1)
    tracker.close()
    original = run_id(directory)
    other = f"sqlite:///{shutil.copy(empty_database, tmp_path / 'other.db')}"
    assert main(["sync", "--uri", other, str(directory)]) == 0
    assert history(other, directory, "train/loss") == [(1, 0.5)]
    assert run_id(directory) != original
    assert main(["sync", str(directory)]) == 0
    assert run_id(directory) == original and history(database_uri, directory, "train/loss") == [(1, 0.5)]


def test_sync_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(tmp_path)]) == 1
    assert "no tracked run here" in capsys.readouterr().err
    assert main(["sync", "--uri", "./mlruns", str(tmp_path)]) == 2
    assert "file store" in capsys.readouterr().err


def test_sync_ships_what_is_there_of_a_run_that_was_copied_in_part(
    tmp_path: Path, database_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    directory, note = tmp_path / "run", tmp_path / "note.txt"
    note.write_text("x")
    tracker = Tracker(config(database_uri, enabled=False), directory, params={}, artifacts=[note])
    tracker.log({"train/loss": 0.5}, 1)
    tracker.close()
    shutil.rmtree(directory / "artifacts")
    for _ in range(2):
        assert main(["sync", str(directory)]) == 0
    assert history(database_uri, directory, "train/loss") == [(1, 0.5)]
    assert "artifacts/note.txt is missing: MLflow will not have it" in caplog.text


def test_a_live_run_is_not_shipped_twice_at_once(tmp_path: Path, database_uri: str) -> None:
    directory = tmp_path / "run"
    tracker = Tracker(config(database_uri), directory, params={})
    wait_for(lambda: (directory / "run_id").exists(), 60, "the run")
    command = [sys.executable, "-m", "pretrain.tracking", "sync", str(directory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    tracker.close()
    assert result.returncode == 1 and "being shipped by another process" in result.stderr


@pytest.mark.parametrize(
    "uri", ["./mlruns", "mlruns", "file:///data/mlruns", "ftp://host/x", "sqlite://", "sqlite:////no/such/folder/x.db"]
)
def test_uris_that_cannot_work_are_refused_in_words(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = validate_uri(uri)
    assert problem and "\n" not in problem and "use sqlite:///mlflow.db" in problem
    with pytest.raises(ValueError, match="tracking.uri"):
        Tracker(TrackingConfig(uri=uri), tmp_path / "run", params={})
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert validate_uri("")


def test_default_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri() == f"sqlite:///{tmp_path}/mlflow.db" and validate_uri("") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert resolve_uri() == "http://tracking:5000" and validate_uri("") is None
    assert resolve_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"


def test_settings_out_of_range_are_refused() -> None:
    problems = TrackingConfig(experiment="", system_metrics_interval_s=0.0, drain_timeout_s=-1.0, enabled=False).problems()
    assert len(problems) == 3 and all(problem.startswith("tracking.") for problem in problems)


def test_help_is_quick_and_imports_stay_light() -> None:
    light = "import sys, pretrain.tracking, pretrain.compare.__main__; assert not {'torch', 'megatron', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], check=True, timeout=60)
    for module in ("pretrain.tracking", "pretrain.compare"):
        before = os.times().children_user + os.times().children_system
        start = time.monotonic()
        result = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60)
        cpu_s = os.times().children_user + os.times().children_system - before
        assert result.returncode == 0 and "usage" in result.stdout
        assert min(cpu_s, time.monotonic() - start) < 1.0
