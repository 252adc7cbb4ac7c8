"""Run directories compared as such: the same result as through MLflow, and no MLflow needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.compare.__main__ import main
from pretrain.compare.directories import load_directories
from pretrain.compare.load import Curve, load_runs
from pretrain.tracking import Tracker, TrackingConfig
from pretrain.tracking.store import connect
from tests.tracking import synthetic

STEPS = 20
OFFLINE = TrackingConfig(experiment="quickstart", enabled=False, system_metrics=False, run_name="dense")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[str, Path]:
    """Three runs that MLflow has as well, one of them resumed, and with what a journal has besides."""
    folder = tmp_path_factory.mktemp("shipped")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    uri = f"sqlite:///{folder}/mlflow.db"
    for name in ("dense", "qsparse"):
        synthetic.write_run(folder, name, uri, steps=STEPS)
    config = TrackingConfig(experiment="quickstart", uri=uri, system_metrics=True, system_metrics_interval_s=0.01, run_name="resumed")
    for resumed, steps, offset in ((None, range(1, 6), 10.0), (3, range(4, 9), 20.0)):
        tracker = Tracker(config, folder / "resumed", params={"qsparse.keep": 0.5, "train.steps": 8}, resumed_from_step=resumed)
        for step in steps:
            odd = {"layer[1]/x": float("nan"), "val/loss": float("inf"), "experts/0": 1.0, "train/tokens": 7 * step}
            tracker.log({"train/loss": offset + step, **odd}, step)
        tracker.close("FINISHED" if resumed else "KILLED")
    return uri, folder


def runs_json(output: Path, *arguments: object) -> dict:
    assert main([*map(str, arguments), "--output", str(output)]) == 0
    return json.loads((output / "runs.json").read_text())


def test_directories_give_what_mlflow_gives(shipped: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, folder = shipped
    tracked = runs_json(tmp_path / "tracked", "--experiment", "quickstart", "--uri", uri)
    table = capsys.readouterr().out.partition("report:")[0]
    direct = runs_json(tmp_path / "direct", *(folder / name for name in ("dense", "qsparse", "resumed")))
    printed = capsys.readouterr().out
    assert direct == tracked
    assert printed.partition("report:")[0] == table and "in MLflow" not in printed
    assert (tmp_path / "direct" / "curves.png").read_bytes() == (tmp_path / "tracked" / "curves.png").read_bytes()
    assert "read from their directories" in (tmp_path / "direct" / "index.html").read_text()
    resumed = next(run for run in direct["runs"] if run["name"] == "resumed")
    assert resumed["history"]["train/loss"]["values"] == [11.0, 12.0, 13.0, 24.0, 25.0, 26.0, 27.0, 28.0]
    assert any(name.startswith("system/") for name in resumed["history"]) and "layer_1_/x" in resumed["history"]
    assert not any(name.startswith("experts/") for name in resumed["history"])


def test_no_mlflow_is_needed(shipped: tuple[str, Path], tmp_path: Path) -> None:
    arguments = [str(shipped[1] / "dense"), "--output", str(tmp_path / "report")]
    code = f"import sys; from pretrain.compare.__main__ import main; assert main({arguments!r}) == 0; assert 'mlflow' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "mlflow.db").exists()


def test_directories_and_runs_of_an_experiment_together(shipped: tuple[str, Path], tmp_path: Path) -> None:
    uri, folder = shipped
    local = tmp_path / "local"
    tracker = Tracker(OFFLINE, local, params={"qsparse.keep": 1.0, "bitnet.enabled": False})
    tracker.log({"train/loss": 3.0, "val/loss": 3.5, "train/tokens": 5}, 1)
    tracker.close()
    found = runs_json(
        tmp_path / "report", local, folder / "qsparse", "--experiment", "quickstart", "--runs", "dense", "qsparse", "--uri", uri,
        "--baseline", "dense (MLflow)",
    )  # fmt: skip
    assert [run["name"] for run in found["runs"]] == ["dense (MLflow)", f"dense ({local})", "qsparse"]
    assert [run["run_id"] == "" for run in found["runs"]] == [False, True, False]
    assert f"qsparse: of this run its directory {folder / 'qsparse'} is read, not MLflow" in found["notes"]
    gap = found["runs"][2]["summary"]["gap"]
    assert gap == synthetic.validation_loss("qsparse", STEPS, STEPS) - synthetic.validation_loss("dense", STEPS, STEPS)
    # The link into MLflow charts what is there, whichever way it was read.
    client = connect(uri)
    tags = client.get_experiment_by_name("quickstart").tags
    filters = [json.loads(value)["searchFilter"] for name, value in tags.items() if name.startswith("mlflow.sharedViewState.")]
    assert any(text.count("'") == 4 and all(found["runs"][i]["run_id"] in text for i in (0, 2)) for text in filters)


def test_two_directories_of_one_run_name_are_told_apart(shipped: tuple[str, Path], tmp_path: Path) -> None:
    first, second = shipped[1] / "dense", Path(shutil.copytree(shipped[1] / "dense", tmp_path / "again"))
    found = runs_json(tmp_path / "report", first, second)
    assert [run["name"] for run in found["runs"]] == [f"dense ({first})", f"dense ({second})"]
    assert found["baseline"] == f"dense ({first})" and found["runs"][1]["summary"]["gap"] == 0


def test_a_run_at_work_or_killed_is_compared_as_far_as_it_came(tmp_path: Path) -> None:
    tracker = Tracker(OFFLINE, tmp_path / "run", params={})
    for step in (1, 2):
        tracker.log({"train/loss": 5.0 - step}, step)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "timest')
    selection = load_directories([tmp_path / "run"])
    assert selection.runs[0].history["train/loss"] == Curve([1, 2], [4.0, 3.0])
    assert any("has not finished (RUNNING)" in note for note in selection.notes)
    tracker.close("KILLED")
    assert any("has not finished (KILLED)" in note for note in load_directories([tmp_path / "run"]).notes)


@pytest.mark.parametrize("damage", [b"\x00\x00\x00\n", b'{"step": 1}\n', b'{"step": 1, "timestamp_ms": 2, "x": "y"}\n', b"[]\n"])
def test_a_damaged_line_is_left_out_and_noted(damage: bytes, shipped: tuple[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shipped[1] / "dense", tmp_path / "copy"))
    journal = copy / "metrics.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:5], damage, *lines[6:]]))
    selection = load_directories([copy])
    assert selection.notes == [f"{journal}, line 6 is damaged and left out"]
    whole = load_runs(shipped[0], "quickstart", ["dense"]).runs[0].history["train/loss"]
    assert selection.runs[0].history["train/loss"].steps == [step for step in whole.steps if step != 5]


def _without_journal(run: Path) -> list:
    (run / "metrics.jsonl").unlink()
    return [run]


def _without_record(run: Path) -> list:
    (run / "run.json").unlink()
    return [run]


def _with_damaged_record(run: Path) -> list:
    (run / "run.json").write_text('{"format_version": 1')
    return [run]


def _without_losses(run: Path) -> list:
    (run / "metrics.jsonl").write_text('{"step": 1, "timestamp_ms": 2, "val/loss": 3.0}\n')
    return [run]


FAULTS = {
    "no journal": (_without_journal, "holds no journal (metrics.jsonl is missing)"),
    "no record": (_without_record, "holds no run (run.json is missing): name run directories"),
    "damaged record": (_with_damaged_record, "holds no run that can be read: "),
    "no losses": (_without_losses, "nothing to compare: dense is left out for want of train/loss"),
    "twice": (lambda run: [run, run.parent / "." / run.name], "is named twice"),
    "missing": (lambda run: [run, run.parent / "gone"], "gone holds no run (run.json is missing)"),
    "no baseline": (lambda run: [run, "--baseline", "spares"], "the baseline 'spares' is not among"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_one_line_and_exit_2(fault: str, shipped: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    harm, words = FAULTS[fault]
    arguments = harm(Path(shutil.copytree(shipped[1] / "dense", tmp_path / "copy")))
    assert main([*map(str, arguments), "--output", str(tmp_path / "report")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "report").exists()


def test_an_output_that_is_a_file_and_a_bound_that_is_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("theirs")
    for arguments, words in (
        (["--output", tmp_path / "file"], "is a file: name a folder"),
        (["--output", ""], "the path is empty"),
        (["--output", tmp_path / "report", "--require-under-unigram", "nan"], "must be a finite number"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path), *map(str, arguments)])
        assert caught.value.code == 2 and words in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "theirs"


@pytest.mark.parametrize(("arguments", "words"), [([], "name run directories, or"), (["run", "--runs", "dense"], "with --experiment")])
def test_what_is_missing_on_the_command_line_is_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--output", "report"])
    assert caught.value.code == 2 and words in capsys.readouterr().err
