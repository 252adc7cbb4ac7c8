"""Several sessions of one run: files that change between them, a lost record, what the user is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pretrain.tracking import Tracker, TrackingConfig, read_journal
from pretrain.tracking.__main__ import main
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
