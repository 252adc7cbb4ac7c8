"""Several sessions of one run: files that change between them, a lost record, what the user is told."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pretrain.tracking import Tracker, TrackingConfig, read_journal
from pretrain.tracking.__main__ import main
from pretrain.tracking.record import RunRecord
from pretrain.tracking.state import ShippingState
from pretrain.tracking.store import connect


def config(uri: str, **changes) -> TrackingConfig:
    return TrackingConfig(**{"experiment": "tests", "uri": uri, "system_metrics": False, "drain_timeout_s": 60.0, **changes})


def run_id(directory: Path) -> str:
    return (directory / "run_id").read_text().strip()


def test_each_sessions_files_arrive_as_they_were(tmp_path: Path, database_uri: str) -> None:
    """Nothing is shipped before the last session: by then config.yaml says something else three times over."""
    directory, original = tmp_path / "run", tmp_path / "run" / "config.yaml"
    directory.mkdir()
    for number, content in enumerate(["steps: 10", "steps: 20", "steps: 20", "steps: 10"]):
        original.write_text(content)
        resumed = {"resumed_from_step": number} if number else {}
        Tracker(config(database_uri, enabled=False), directory, params={}, artifacts=[original], **resumed).close("KILLED")
    original.unlink()
    assert main(["sync", str(directory)]) == 0
    client = connect(database_uri)
    names = [item.path for item in client.list_artifacts(run_id(directory))]
    assert names == ["config.resume.1.yaml", "config.resume.3.yaml", "config.yaml"]
    contents = {name: Path(client.download_artifacts(run_id(directory), name, str(tmp_path))).read_text() for name in names}
    assert contents == {"config.yaml": "steps: 10", "config.resume.1.yaml": "steps: 20", "config.resume.3.yaml": "steps: 10"}

    # A new run takes the copies of the one before out of the way, where they can still be shipped.
    original.write_text("steps: 30")
    Tracker(config(database_uri, enabled=False), directory, params={}, artifacts=[original]).close()
    assert [path.name for path in (directory / "artifacts").iterdir()] == ["config.yaml"]
    assert (directory / "artifacts" / "config.yaml").read_text() == "steps: 30"
    assert (directory / "previous" / "1" / "artifacts" / "config.resume.1.yaml").read_text() == "steps: 20"


@pytest.mark.parametrize("journal_is_lost", [False, True])
def test_a_lost_record_is_begun_anew(tmp_path: Path, database_uri: str, journal_is_lost: bool) -> None:
    directory = tmp_path / "run"

    def session(steps: range, **resumed: int) -> bool:
        tracker = Tracker(config(database_uri), directory, params={"lr": 1}, **resumed)
        if tracker.is_new_run:
            tracker.log({"model/parameters": 5.0}, 0)
        for step in steps:
            tracker.log({"train/loss": 1 / step, "train/lr": step * 1e-3}, step)
        tracker.close()
        return tracker.is_new_run

    assert session(range(1, 8))
    first = run_id(directory)
    assert not session(range(5, 8), resumed_from_step=4)
    (directory / "run.json").unlink()
    if journal_is_lost:
        (directory / "metrics.jsonl").unlink()
    assert session(range(5, 11), resumed_from_step=4) == journal_is_lost

    rows = read_journal(directory / "metrics.jsonl")
    assert [row["step"] for row in rows] == ([0, *range(5, 11)] if journal_is_lost else [*range(11)])
    client = connect(database_uri)
    assert run_id(directory) == first and client.get_run(first).data.params == {"lr": "1"}
    assert sorted({point.step for point in client.get_metric_history(first, "train/loss")}) == [*range(1, 11)]
    assert {point.value for point in client.get_metric_history(first, "model/parameters")} == {5.0}


def test_the_user_is_told_once_where_the_run_is(tmp_path: Path, database_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run"
    for resumed in ({}, {"resumed_from_step": 3}):
        tracker = Tracker(config(database_uri), directory, params={}, **resumed)
        for step in range(4, 7):
            tracker.log({"train/loss": 1 / step}, step)
        tracker.close()
        told = re.findall(r"^MLflow run: (.*)$", capsys.readouterr().out, re.MULTILINE)
        assert told == [f"{run_id(directory)} in {database_uri}"]


def test_a_record_that_was_lost_and_begun_anew_with_other_settings_arrives(tmp_path: Path, database_uri: str) -> None:
    directory = tmp_path / "run"
    Tracker(config(database_uri), directory, params={"lr": 1, "steps": 10}).close()
    first = run_id(directory)
    (directory / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json cannot be read .*: restore it, or move it away, and the next start writes it anew"):
        Tracker(config(database_uri), directory, params={"lr": 2, "steps": 10}, resumed_from_step=4)
    (directory / "run.json").unlink()
    Tracker(config(database_uri), directory, params={"lr": 2, "steps": 10, "new": 1}, resumed_from_step=4).close()
    assert run_id(directory) == first and ShippingState.load(directory).has_everything(RunRecord.load(directory), directory)
    data = connect(database_uri).get_run(first).data
    assert data.params == {"lr": "1", "steps": "10", "new": "1"} and data.tags["resume.0.lr"] == "2" and "resume.0.steps" not in data.tags


def test_a_copy_beside_its_original_is_another_run(tmp_path: Path, database_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    original, copy, moved = (tmp_path / name for name in ("run", "copy", "moved"))

    def session(directory: Path, loss: float, **resumed: int) -> None:
        tracker = Tracker(config(database_uri), directory, params={}, **resumed)
        for step in range(1 + resumed.get("resumed_from_step", 0), 5):
            tracker.log({"train/loss": loss}, step)
        tracker.close()

    session(original, 1.0)
    shutil.copytree(original, copy)
    session(copy, 2.0, resumed_from_step=2)
    assert f"{copy} is a copy of {original}: it goes on as another run in MLflow" in caplog.text
    client = connect(database_uri)
    assert run_id(copy) != run_id(original)
    for directory, losses in ((original, [1.0] * 4), (copy, [1.0, 1.0, 2.0, 2.0])):
        points = client.get_metric_history(run_id(directory), "train/loss")
        assert [point.value for point in sorted(points, key=lambda point: point.step)] == losses
    assert client.get_run(run_id(copy)).data.tags["copied_from"] == str(original) and client.get_run(run_id(copy)).info.run_name == "copy"

    before = run_id(original)
    original.rename(moved)
    caplog.clear()
    session(moved, 1.0, resumed_from_step=2)
    session(copy, 2.0, resumed_from_step=2)
    assert run_id(moved) == before and "is a copy" not in caplog.text


def test_a_journal_that_was_removed_is_told(tmp_path: Path, database_uri: str, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "run"
    Tracker(config(database_uri), directory, params={}).close()
    (directory / "metrics.jsonl").unlink()
    Tracker(config(database_uri), directory, params={}, resumed_from_step=4).close()
    assert "metrics.jsonl holds nothing up to step 4 any more" in caplog.text
