"""Edits of the checkout do not reach a run that has begun, unless they are asked for."""

import pytest

from pretrain.job.snapshot import take
from tests.slurm.jobs import ROOT, flags, submit


@pytest.mark.slurm
def test_a_checkout_that_is_edited_meanwhile(cluster, shards, tmp_path):
    checkout = take(ROOT, tmp_path / "a home").path
    given = flags(tmp_path, shards, "--tracking.enabled", "false", "--train.steps", 8)
    script = checkout / "slurm" / "pretrain_7b_qsparse.sh"
    job = submit(cluster, tmp_path, *given, script=script, env={"TEST_FAULT": "0 wait 5 0", "UPDATE_CODE": "1"})
    job.until_waiting()
    for broken, text in (("pretrain/train.py", "raise SystemExit('tampered')\n"), ("slurm/lib/launch.sh", "echo tampered; exit 9\n")):
        (checkout / broken).write_text(text + (checkout / broken).read_text())
    job.signal("--batch", "--signal=USR1")
    job.until_said("USR1: the training processes are to finish")
    job.go_on()
    log = job.finish()
    assert "going on after step 5" in log and "tampered" not in log
    assert "code: this run goes on with its own copy" in log and f"differs from {checkout}" in log

    longer = [*given, "--train.steps", 9, "--allow_change", "train.steps"]
    (checkout / "slurm/lib/launch.sh").write_text((ROOT / "slurm/lib/launch.sh").read_text())
    again = submit(cluster, tmp_path, *longer, script=script, env={"UPDATE_CODE": "1"})
    assert again.wait()["JobState"] == "FAILED" and "tampered" in job.log
    assert (job.run / "code.1").is_dir()


@pytest.mark.slurm
def test_dry_run_inside_of_a_job(cluster, shards, tmp_path):
    job = submit(cluster, tmp_path, *flags(tmp_path, shards, "--tracking.enabled", "false"), env={"DRY_RUN": "1"})
    log = job.finish()
    assert "no problems found: this run can start" in log and "DRY_RUN is set: nothing is trained" in log and not job.run.exists()
