"""What a comparison says of seeds, requires of the runs, and prints for the shell."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

import megatron_qsparse.config
from pretrain.compare import table
from pretrain.compare.__main__ import main
from pretrain.compare.ui import serve_command
from pretrain.tracking import Tracker, TrackingConfig
from tests.tracking import synthetic

BAND = (236, 239, 243)


def compare(uri: str, output: Path, *extra: str, experiment: str = "quickstart") -> int:
    return main(["--experiment", experiment, "--uri", uri, "--output", str(output), *extra])


def colors(picture: Path) -> set[tuple[int, int, int]]:
    from PIL import Image

    with Image.open(picture) as image:
        return {color for _, color in image.convert("RGB").getcolors(maxcolors=image.width * image.height)}


def test_the_seed_spread_is_the_measured_one_or_none(tmp_path: Path, database_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dense", "qsparse"):
        synthetic.write_run(tmp_path, name, database_uri)
    assert compare(database_uri, tmp_path / "one") == 0
    printed, page = capsys.readouterr().out, (tmp_path / "one" / "index.html").read_text()
    for text in (printed, page):
        assert "No setting here was trained with two seeds" in text and "--train.seed 1 --tracking.run_name X_seed1" in text
        assert "a few hundredths of a nat at this size" in text and "0.034" not in text
    assert json.loads((tmp_path / "one" / "runs.json").read_text())["seeds"] == []
    assert '"spread":null' in page and "Inside the band" not in page
    assert BAND not in colors(tmp_path / "one" / "curves.png")

    synthetic.write_run(tmp_path, "dense", database_uri, seed=1)
    assert compare(database_uri, tmp_path / "two") == 0
    printed, page = capsys.readouterr().out, (tmp_path / "two" / "index.html").read_text()
    for text in (printed, page):
        assert "Runs that differ in the seed alone differ in validation loss: dense, dense_seed1 by 0.021 nat." in text
        assert "No setting here" not in text
    (seeds,) = json.loads((tmp_path / "two" / "runs.json").read_text())["seeds"]
    assert seeds["runs"] == ["dense", "dense_seed1"] and seeds["spread"] == pytest.approx(synthetic.SEED_STEP)
    assert re.search(r'"spread":0\.0209?', page) and "differed by (0.021 nat)" in page
    assert BAND in colors(tmp_path / "two" / "curves.png")


def test_runs_that_differ_in_more_than_the_seed_measure_nothing(
    tmp_path: Path, database_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    synthetic.write_run(tmp_path, "dense", database_uri, experiment="sweep")
    synthetic.write_run(tmp_path, "qsparse", database_uri, experiment="sweep", seed=1)
    synthetic.write_run(tmp_path, "dense", database_uri, experiment="sweep", seed=2, steps=20)
    assert compare(database_uri, tmp_path / "report", experiment="sweep") == 0
    printed = capsys.readouterr().out
    assert "No setting here was trained with two seeds" in printed and "hundredths" not in printed
    assert json.loads((tmp_path / "report" / "runs.json").read_text())["seeds"] == []


def test_required_distance_under_the_unigram_entropy(tmp_path: Path, database_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("dense", "qsparse"):
        synthetic.write_run(tmp_path, name, database_uri)
    report = tmp_path / "report"
    assert compare(database_uri, report, "--require-under-unigram", "1.5") == 0
    assert "all 2 runs are at least 1.5 nat under the unigram entropy" in capsys.readouterr().out

    # 6.251 - 4.103 and 6.251 - 4.148 nat
    assert compare(database_uri, report, "--require-under-unigram", "2.12") == 1
    captured = capsys.readouterr()
    assert captured.err == "error: qsparse is 2.103 nat under the unigram entropy, 2.12 are required\n"
    assert "are at least" not in captured.out and (report / "index.html").exists()

    synthetic.write_run(tmp_path, "bitnet", database_uri, validate=False)
    config = TrackingConfig(experiment="quickstart", uri=database_uri, system_metrics=False)
    tracker = Tracker(config, tmp_path / "diverged", params={})
    tracker.log({"train/loss": 5.0, "val/loss": float("nan"), "data/validation_unigram_entropy": 6.0}, 1)
    tracker.close()
    Tracker(config, tmp_path / "killed", params={}).close("KILLED")
    names = ["dense", "bitnet", "diverged", "killed"]
    assert compare(database_uri, report, "--runs", *names, "--require-under-unigram", "1.5") == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: killed is left out of the comparison",
        "error: bitnet lacks val/loss",
        "error: diverged is nan nat under the unigram entropy, 1.5 are required",
    ]


def test_printed_commands_survive_paths_with_spaces() -> None:
    uri = "sqlite:////data/my runs/mlflow.db"
    assert shlex.split(serve_command(uri))[-5:] == ["ui", "--backend-store-uri", uri, "--port", "5000"]


def test_the_columns_are_the_projections_of_the_model() -> None:
    assert table.PROJECTIONS is megatron_qsparse.config.PROJECTIONS
