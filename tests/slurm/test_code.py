"""Edits of the checkout do not reach a run that has begun, unless they are asked for."""

import pytest

from pretrain.job.snapshot import take
from tests.slurm.jobs import ROOT, flags, submit


@pytest.mark.slurm
def test_a_checkout_that_is_edited_meanwhile(cluster, shards, tmp_path):
    checkout = take(ROOT, tmp_path / "a home").path
    settings = checkout / "my settings.yaml"
    settings.write_text("train:\n  steps: 8\n")
    given = flags(checkout, shards, "--tracking.enabled", "false")
    place = given.index("--train.steps")
    given[place : place + 2] = []
    given += ["--config", settings, "--resume", "never"]
    # Submitted in the checkout: python -m looks there first.
    script = checkout / "slurm" / "pretrain_7b_qsparse.sh"
    job = submit(cluster, checkout, *given, script=script, env={"TEST_FAULT": "0 wait 5 0", "UPDATE_CODE": "1"})
    job.until_waiting()
    settings.write_text("train:\n  steps: 8\n# edited\n")
    second = submit(cluster, checkout, *given[:-2], script=script, options=("--nodes=1",))
    assert second.wait()["ExitCode"] == "2:0" and f"{job.run} is in use by process " in job.log
    assert f"goes on with its own copy, {job.run}/code, which differs from {settings}: UPDATE_CODE=1 takes that" in job.log
    for broken, text in (("pretrain/train.py", "raise SystemExit('tampered')\n"), ("slurm/lib/launch.sh", "echo tampered; exit 9\n")):
        (checkout / broken).write_text(text + (checkout / broken).read_text())
    settings.write_text("train:\n  steps: 4\nnot yet: ")
    job.signal("--batch", "--signal=USR1")
    job.until_said("USR1: the training processes are to finish")
    job.go_on()
    log = job.finish()
    assert "going on after step 5" in log and "tampered" not in log
    assert "code: this run goes on with its own copy" in log and f"differs from {checkout}:" in log
    assert (job.run / "finished").read_text() == "8\n"

    settings.write_text("train:\n  steps: 9\n")
    longer = [*given[:-2], "--allow_change", "train.steps"]
    (checkout / "slurm/lib/launch.sh").write_text((ROOT / "slurm/lib/launch.sh").read_text())
    again = submit(cluster, checkout, *longer, script=script, env={"UPDATE_CODE": "1"})
    assert again.wait()["JobState"] == "FAILED" and "tampered" in job.log
    assert (job.run / "code.1").is_dir()


@pytest.mark.slurm
def test_dry_run_inside_of_a_job(cluster, shards, tmp_path):
    """It was submitted from inside of an element of an array, that one's second start."""
    inherited = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "3", "SLURM_RESTART_COUNT": "1"}
    job = submit(cluster, tmp_path, *flags(tmp_path, shards, "--tracking.enabled", "false"), env={"DRY_RUN": "1"} | inherited)
    log = job.finish()
    assert f"job {job.id}, start 1, " in log
    assert "no problems found: this run can start" in log and "DRY_RUN is set: nothing is trained" in log and not job.run.exists()


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("acceptance.sh", "the cases of python -m pretrain.acceptance --flag, on node"),
        ("compare.sh", "python -m pretrain.compare --flag"),
        ("mlflow_server.sh", "python -m mlflow server --flag, in /"),
        ("preflight.sh", "python -m pretrain.preflight node --devices 1 --flag, on node"),
    ],
)
def test_dry_run_inside_of_a_job_that_does_not_train(script, shown, cluster, tmp_path):
    options = ("--nodes=1", "--gpus-per-node=0", "--mem=100M", "--cpus-per-task=1", "--time=5")
    job = submit(cluster, tmp_path, "--flag", script=script, options=options, env={"DRY_RUN": "1", "QSPARSE_RUNS": str(tmp_path / "runs")})
    assert f"DRY_RUN is set: this job would run {shown}" in job.finish() and not (tmp_path / "runs").exists()
