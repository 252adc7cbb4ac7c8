"""The whole road at a few steps a run: text to shards, four runs, report; and a second start that finds everything done."""

import json
import os
import subprocess
import sys
import time

RUNS = {"dense", "qsparse", "bitnet", "bitnet_qsparse"}


def quickstart(folder, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    command = [sys.executable, "-m", "pretrain.quickstart", "--output", str(folder), "--steps", "4", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_four_runs_and_a_report(tmp_path):
    folder = tmp_path / "quickstart"
    output = quickstart(folder)
    report = json.loads((folder / "report" / "runs.json").read_text())
    runs = {run["name"]: run for run in report["runs"]}
    assert runs.keys() == RUNS
    for run in runs.values():
        summary, entropy = run["summary"], run["history"]["data/validation_unigram_entropy"]["values"][0]
        assert 5 < entropy < 7 and 5 < summary["validation_loss"] < 9
        assert summary["under_unigram"] == entropy - summary["validation_loss"]
    assert runs["qsparse"]["summary"]["sparsity"]["attention.qkv"] > 0.59 > runs["dense"]["summary"]["sparsity"]["attention.qkv"]
    assert (folder / "report" / "index.html").stat().st_size > 10_000
    assert (folder / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in RUNS:
        entries = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert entries[-1]["step"] == 4 and entries[-1]["train/tokens"] == 4 * 2048
        assert (folder / "runs" / name / "run_id").exists()
    assert "mlflow" in output and "report" in output

    started = time.monotonic()
    again = quickstart(folder)
    assert again.count("is complete") == 4 and "pretrain.train" not in again
    assert time.monotonic() - started < 60
