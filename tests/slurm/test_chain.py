"""A sweep over an array, tracked by a server that is a job itself, and a report that waits for it."""

import json

import pytest

from tests.pretrain.finished import ARGUMENTS
from tests.pretrain.launch import TINY
from tests.slurm.jobs import ROOT, submit

KEEPS = ("1", "0.4")


@pytest.mark.slurm
def test_sweep_and_report(cluster, shards, tmp_path):
    runs = tmp_path / "runs"
    env = {"QSPARSE_RUNS": str(runs), "QSPARSE_KEEPS": " ".join(KEEPS), "QSPARSE_SWEEP": "trial"}
    server = submit(cluster, tmp_path, script="mlflow_server.sh", options=("--mem=100M", "--time=10"), env=env)
    address = runs / "mlflow" / "mlflow.uri"
    server.until(address.exists, "the server's address")
    env["MLFLOW_TRACKING_URI"] = address.read_text().strip()

    small = [str(flag) for flag in (*TINY, *ARGUMENTS)]
    small[small.index("--train.steps") + 1] = "6"
    small[small.index("--qsparse.keep") : small.index("--qsparse.keep") + 2] = []
    flags = ["--config", ROOT / "pretrain/configs/tiny_qsparse.yaml", "--data.path", shards, *small]
    sweep = submit(cluster, tmp_path, *flags, script="sweep_sparsity.sh", options=("--array=0-1", "--cpus-per-task=1"), env=env)
    directories = [runs / f"trial_keep_{keep}" for keep in KEEPS]
    after = (f"--dependency=afterok:{sweep.id}", "--mem=100M", "--cpus-per-task=1")
    report = submit(
        cluster, tmp_path, "--output", tmp_path / "report", "--experiment", "trial", script="compare.sh", options=after, env=env
    )
    assert cluster.job(report.id)["Reason"] == "Dependency"
    sweep.finish()
    report.finish()

    assert [(directory / "finished").read_text() for directory in directories] == ["6\n", "6\n"]
    found = json.loads((tmp_path / "report" / "runs.json").read_text())
    assert sorted(run["name"] for run in found["runs"]) == ["trial_keep_0.4", "trial_keep_1"]
    tags = [json.loads((directory / "run.json").read_text())["tags"] for directory in directories]
    assert [tag["group"] for tag in tags] == ["trial", "trial"]
    assert server.restarts() == 0
    server.signal("--batch", "--signal=USR1")
    server.until(lambda: server.log.count("serving at") == 2, "serving again")


@pytest.mark.slurm
def test_an_element_too_many(cluster, tmp_path):
    job = submit(cluster, tmp_path, script="sweep_sparsity.sh", options=("--array=7",), env={"QSPARSE_KEEPS": "1 0.4"})
    assert job.wait(30)["JobState"] == "FAILED"
    assert "element 7 of the array has no degree of sparsity: QSPARSE_KEEPS holds 2; submit with --array=0-1" in job.log


@pytest.mark.slurm
def test_a_report_of_a_failed_run_is_not_made(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--no.such_setting", "1")
    options = (f"--dependency=afterok:{job.id}", "--kill-on-invalid-dep=yes", "--mem=100M", "--cpus-per-task=1")
    report = submit(cluster, tmp_path, "--output", tmp_path / "report", "runs/a", script="compare.sh", options=options)
    assert job.wait(30)["JobState"] == "FAILED"
    assert report.wait(30)["JobState"] == "CANCELLED"
