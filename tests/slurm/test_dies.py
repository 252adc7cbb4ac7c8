"""Jobs that lose a node or a rank go on from the newest complete checkpoint, and their run is the unbroken one bit for bit."""

import json
import os
import signal
import time

import pytest

from pretrain.job import attempts
from pretrain.job.__main__ import END_WAIT_S
from pretrain.tracking import TrackingConfig
from tests.pretrain.finished import Finished
from tests.slurm.jobs import START_S, start


@pytest.mark.slurm
@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_node_dies(moment, cluster, shards, database, unbroken, tmp_path, slurm_log):
    # Rank 1, on the second node; the save is that after step 3.
    job = start(cluster, tmp_path, shards, database, fault="1 wait 5 0" if moment == "step" else "1 save 0 0")
    job.until_waiting()
    job.times["signal"] = time.time()
    cluster.kill_node(cluster.client("scontrol", "show", "hostnames", cluster.job(job.id)["NodeList"]).split()[1])
    job.go_on()
    job.until(lambda: job.restarts() == 1, "requeued")
    log = job.finish()
    step = 3 if moment == "step" else 0
    assert ("going on after step 3" in log) == bool(step)
    assert Finished.read(tmp_path).differences(unbroken) == []
    slurm_log(f"a node killed during a {moment}", job, went_on_after=step)


@pytest.mark.slurm
def test_a_rank_fails(cluster, shards, database, unbroken, tmp_path, slurm_log):
    job = start(cluster, tmp_path, shards, database, fault="1 raise 5 0")
    job.until(lambda: job.restarts() == 1, "requeued")
    log = job.finish()
    assert "failed in step 4: between two steps" in log or "ArithmeticError: a fault of this test" in log
    assert "again: the training processes ended with status 1; the newest complete checkpoint is of step 3" in log
    assert "*** STEP" not in log, "Slurm was asked to end the step: it may ask for that once more, of the next start"
    assert Finished.read(tmp_path).differences(unbroken) == []
    slurm_log("a rank failed", job, went_on_after=3)


@pytest.mark.slurm
def test_a_rank_fails_and_another_notices_nothing(cluster, shards, database, unbroken, tmp_path):
    """It is killed after a while."""
    job = start(cluster, tmp_path, shards, database, fault="0 wait 5 0,1 raise 5 0")
    job.until_waiting()
    (owner,) = (job.run / ".owner").glob("*.json")
    os.kill(json.loads(owner.read_text())["pid"], signal.SIGSTOP)
    job.until(lambda: job.restarts() == 1, "requeued", timeout=END_WAIT_S + TrackingConfig().drain_timeout_s + START_S)
    assert "going on after step 3" in job.finish()
    assert Finished.read(tmp_path).differences(unbroken) == []


@pytest.mark.slurm
def test_a_rank_fails_at_the_same_step_each_time(cluster, shards, database, tmp_path):
    job = start(cluster, tmp_path, shards, database, fault="1 raise 5 *")
    found = job.wait(4 * START_S)
    assert found["JobState"] == "FAILED" and job.restarts() == 3, job.log
    assert "failed: 3 starts in a row ended without a new checkpoint (the newest complete one is of step 3)" in job.log
    assert [attempt.outcome for attempt in attempts.read(job.run)] == ["again", "again", "again", "failed"]
