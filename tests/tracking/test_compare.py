"""The comparison on runs whose every number is known (synthetic.py)."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.compare.__main__ import main
from pretrain.compare.load import Curve, load_runs
from pretrain.compare.series import bucket_means, points_per_mean
from pretrain.compare.table import si
from pretrain.compare.ui import CHARTS
from pretrain.tracking import Tracker, TrackingConfig
from pretrain.tracking.store import connect
from tests.tracking import synthetic

STEPS = 40


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> tuple[str, Path]:
    """A store with the four runs, and the folder of their run directories."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    uri = f"sqlite:///{folder}/mlflow.db"
    for name in ("qsparse", "dense", "bitnet", "bitnet_qsparse"):
        synthetic.write_run(folder, name, uri, steps=STEPS)
    return uri, folder


def compare(uri: str, output: Path, *extra: str) -> int:
    return main(["--experiment", "quickstart", "--uri", uri, "--output", str(output), *extra])


def test_report_of_the_four_runs(quickstart: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, folder = quickstart
    assert compare(uri, tmp_path) == 0
    content = json.loads((tmp_path / "runs.json").read_text())
    assert content["baseline"] == "dense"
    assert [run["name"] for run in content["runs"]] == ["dense", "qsparse", "bitnet", "bitnet_qsparse"]
    dense_loss = synthetic.validation_loss("dense", STEPS, STEPS)
    for run in content["runs"]:
        name, summary = run["name"], run["summary"]
        keep = synthetic.RUNS[name][0]
        steps = list(range(1, STEPS + 1))
        losses = [synthetic.train_loss(name, step, STEPS) for step in steps]
        validation = synthetic.validation_loss(name, STEPS, STEPS)
        assert run["history"]["train/loss"] == {"steps": steps, "values": losses}
        assert run["history"]["val/loss"]["steps"] == [0, 10, 20, 30, 40]
        assert summary["train_loss"] == statistics.fmean(losses[-5:])
        assert summary["validation_loss"] == validation
        assert summary["gap"] == validation - dense_loss
        assert summary["under_unigram"] == synthetic.ENTROPY - validation
        assert set(summary["sparsity"].values()) == {statistics.fmean([1 - keep] * 5)}
        assert summary["parameters"] == synthetic.PARAMETERS
        assert summary["activated_parameters"] == synthetic.PARAMETERS * (0.4 + 0.6 * keep)
        assert summary["tokens_per_s"] == synthetic.RUNS[name][3] + 1
        assert summary["peak_memory_gib"] == 0.85
        assert run["run_id"] == (folder / name / "run_id").read_text().strip() and run["status"] == "FINISHED"
    assert content["differing_settings"]["qsparse.keep"] == ["1.0", "0.4", "1.0", "0.4"]
    assert "model.preset" not in content["differing_settings"] and "output_dir" not in content["differing_settings"]

    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("bitnet_qsparse"))
    assert row.split()[2:4] == ["4.133", "+0.030"]
    assert "One seed does not rank runs whose gap is small. No setting here was trained with two seeds" in printed
    assert f"mlflow ui --backend-store-uri {uri} --port 5000" in printed
    link = re.search(r"http://127\.0\.0\.1:5000/#/experiments/(\d+)/runs\?viewStateShareKey=(\w+)&compareRunsMode=CHART", printed)
    assert link
    state = json.loads(connect(uri).get_experiment(link.group(1)).tags[f"mlflow.sharedViewState.{link.group(2)}"])
    assert all(run["run_id"] in state["searchFilter"] for run in content["runs"])
    assert [chart["metricKey"] for chart in state["compareRunCharts"]] == [metric for _, metric, _ in CHARTS]
    assert len(connect(uri).search_runs([link.group(1)], state["searchFilter"])) == 4


def test_page_needs_nothing_from_elsewhere(quickstart: tuple[str, Path], tmp_path: Path) -> None:
    assert compare(quickstart[0], tmp_path) == 0
    page = (tmp_path / "index.html").read_text()
    assert set(re.findall(r"\w+://([\w.:-]+)", page.replace(quickstart[0], ""))) == {"127.0.0.1:5000"}
    assert not re.search(r"<link|<img|@import|url\((?!#)|src=", page)
    assert "One seed does not rank runs whose gap is small" in page and "prefers-color-scheme:dark" in page
    assert not re.search(r"\$[a-z_]+\b", re.sub(r"<script>.*</script>", "", page, flags=re.DOTALL))
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))
    assert [axis["key"] for axis in data["axes"]] == ["tokens", "flops"]
    qsparse = data["runs"][1]["series"]
    assert qsparse["tokens"]["validation_x"] == [0, 10 * 2048, 20 * 2048, 30 * 2048, 40 * 2048]
    assert qsparse["tokens"]["gap"][-1] == pytest.approx(0.045, abs=1e-6)
    dense_end, sparse_end = data["runs"][0]["series"]["flops"]["train_x"][-1], qsparse["flops"]["train_x"][-1]
    assert sparse_end / dense_end == pytest.approx(0.64, rel=1e-6)


def test_picture_is_an_image_with_curves(quickstart: tuple[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    assert compare(quickstart[0], tmp_path) == 0
    with Image.open(tmp_path / "curves.png") as image:
        image.verify()
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and image.width > 1500
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=image.width * image.height)}
    # A marker of each run's colour (Okabe and Ito's first four) is on the picture.
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167)} <= colors


def test_the_report_is_deterministic(quickstart: tuple[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert compare(quickstart[0], tmp_path / name) == 0
    for file in ("runs.json", "index.html", "curves.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_chosen_runs_and_baseline(quickstart: tuple[str, Path], tmp_path: Path) -> None:
    assert compare(quickstart[0], tmp_path, "--runs", "bitnet_qsparse", "bitnet", "--baseline", "bitnet") == 0
    content = json.loads((tmp_path / "runs.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["bitnet", "bitnet_qsparse"]
    assert content["runs"][1]["summary"]["gap"] == pytest.approx(0.037)


def test_newest_finished_run_of_a_name_wins(tmp_path: Path, database_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for attempt, steps in (("first", 10), ("second", 20)):
        synthetic.write_run(tmp_path / attempt, "dense", database_uri, steps=steps)
    config = TrackingConfig(experiment="quickstart", uri=database_uri, system_metrics=False, run_name="dense")
    tracker = Tracker(config, tmp_path / "third", params={})
    tracker.log({"train/loss": 9.0}, 1)
    tracker.close("FAILED")
    Tracker(TrackingConfig(experiment="quickstart", uri=database_uri, system_metrics=False), tmp_path / "crashed", params={}).close(
        "KILLED"
    )
    assert compare(database_uri, tmp_path / "report") == 0
    content = json.loads((tmp_path / "report" / "runs.json").read_text())
    (run,) = content["runs"]
    assert run["params"]["train.steps"] == "20" and run["run_id"] == (tmp_path / "second/dense/run_id").read_text().strip()
    assert any("2 other runs of that name not" in note for note in content["notes"])
    assert any(note.startswith("crashed is left out") and "KILLED" in note for note in content["notes"])
    assert "note: crashed is left out" in capsys.readouterr().out


def test_gaps_between_unequal_amounts_of_training_are_marked(tmp_path: Path, database_uri: str) -> None:
    synthetic.write_run(tmp_path, "dense", database_uri, steps=20)
    synthetic.write_run(tmp_path, "qsparse", database_uri, steps=10, interval=3)
    assert compare(database_uri, tmp_path / "report") == 0
    notes = json.loads((tmp_path / "report" / "runs.json").read_text())["notes"]
    assert notes == [
        "qsparse is validated last at step 9 of 20.5k tokens, dense at step 20 of 41.0k: their gap compares different amounts of training"
    ]
    assert 'id="gap"' not in (tmp_path / "report" / "index.html").read_text()


def test_runs_without_points_or_validation_are_mentioned(tmp_path: Path, database_uri: str) -> None:
    synthetic.write_run(tmp_path, "dense", database_uri, steps=10)
    synthetic.write_run(tmp_path, "qsparse", database_uri, steps=10, validate=False)
    config = TrackingConfig(experiment="quickstart", uri=database_uri, system_metrics=False)
    Tracker(config, tmp_path / "pointless", params={"qsparse.keep": 1.0}).close()
    assert compare(database_uri, tmp_path / "report") == 0
    content = json.loads((tmp_path / "report" / "runs.json").read_text())
    assert [run["name"] for run in content["runs"]] == ["dense", "qsparse"]
    assert content["runs"][1]["summary"]["validation_loss"] is None and content["runs"][1]["summary"]["gap"] is None
    assert any("pointless is left out" in note and "pretrain.tracking sync" in note for note in content["notes"])
    assert any(note.startswith("qsparse has no val/loss") for note in content["notes"])
    assert (tmp_path / "report" / "curves.png").stat().st_size > 10_000


def test_a_run_with_nan_and_without_axes_still_makes_a_report(tmp_path: Path, database_uri: str) -> None:
    config = TrackingConfig(experiment="quickstart", uri=database_uri, system_metrics=False)
    tracker = Tracker(dataclasses.replace(config, run_name="diverged</script>"), tmp_path / "run", params={})
    for step in range(1, 6):
        tracker.log({"train/loss": float("nan") if step > 3 else 5.0, "val/loss": float("inf")}, step)
    tracker.close()
    assert compare(database_uri, tmp_path / "report") == 0
    content = json.loads((tmp_path / "report" / "runs.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["baseline"] is None and any("--baseline" in note for note in content["notes"])
    assert content["runs"][0]["history"]["val/loss"]["values"] == ["Infinity"] * 5
    assert content["runs"][0]["summary"]["train_loss"] == "NaN"
    assert (tmp_path / "report" / "index.html").read_text().count("</script>") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "typo"], "there is no experiment 'typo'"),
        (["--experiment", "empty"], "has no runs yet"),
        (["--experiment", "quickstart", "--runs", "dense", "spares"], "no run named spares; it has"),
        (["--experiment", "quickstart", "--baseline", "spares"], "the baseline 'spares' is not among"),
        (["--experiment", "unfinished"], "nothing to compare: killed is left out"),
        (["--experiment", "quickstart", "--uri", "./mlruns"], "file store"),
        (["--experiment", "quickstart", "--uri", "http://127.0.0.1:9"], "cannot read MLflow at http://127.0.0.1:9"),
    ],
)
def test_errors_are_one_line_and_exit_2(
    quickstart: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    uri = quickstart[0]
    if arguments[1] == "empty" and connect(uri).get_experiment_by_name("empty") is None:
        connect(uri).create_experiment("empty")
    if arguments[1] == "unfinished":
        Tracker(TrackingConfig(experiment="unfinished", uri=uri, system_metrics=False), tmp_path / "killed", params={}).close("KILLED")
    assert main(["--uri", uri, "--output", str(tmp_path / "report"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "report").exists()


def test_a_missing_database_is_not_created(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pretrain.compare",
        "--experiment",
        "x",
        "--output",
        "report",
        "--uri",
        f"sqlite:///{tmp_path}/none.db",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "there is no MLflow database" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "none.db").exists()


def test_repeated_steps_count_with_their_newest_point(tmp_path: Path, database_uri: str) -> None:
    config = TrackingConfig(experiment="quickstart", uri=database_uri, system_metrics=False, run_name="dense")
    tracker = Tracker(config, tmp_path / "run", params={})
    for step in range(1, 6):
        tracker.log({"train/loss": 10.0 + step}, step)
    tracker.close("KILLED")
    tracker = Tracker(config, tmp_path / "run", params={}, resumed_from_step=3)
    for step in range(4, 7):
        tracker.log({"train/loss": 20.0 + step}, step)
    tracker.close()
    (run,) = load_runs(database_uri, "quickstart").runs
    assert run.history["train/loss"] == Curve([1, 2, 3, 4, 5, 6], [11.0, 12.0, 13.0, 24.0, 25.0, 26.0])


def test_thinned_curves_keep_the_mean() -> None:
    numpy = pytest.importorskip("numpy")
    x, y = bucket_means(numpy.arange(1000.0), numpy.arange(1000.0) ** 2)
    assert len(x) <= 120 and points_per_mean(1000) == 9 and points_per_mean(120) == 1
    assert y[0] == numpy.mean(numpy.arange(9.0) ** 2) and x[0] == 4.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (float("nan"), "-"), (5_260_000, "5.26M"), (12_960, "13.0k"), (819_200, "819k"), (999.9, "1.00k"), (0.5, "0.5")],
)
def test_si_prefixes(value: float | None, text: str) -> None:
    assert si(value) == text
