"""Jobs that are signalled, preempted or run out of time go on by themselves, and their run is the unbroken one bit for bit."""

import os
import re
import time

import pytest

from pretrain.callbacks.switches import LOOK_S
from pretrain.job import attempts
from tests.pretrain.finished import Finished
from tests.pretrain.forked import GRACE_S
from tests.slurm import cluster as module
from tests.slurm.jobs import START_S, environment, start


def test_requeued_before_the_time_limit(cluster, shards, database, unbroken, tmp_path, slurm_log):
    job = start(cluster, tmp_path, shards, database)
    job.until_waiting()
    job.signal("--batch", "--signal=USR1")
    job.until_said("USR1: the training processes are to finish")
    job.go_on()
    job.until(lambda: job.restarts() == 1, "requeued")
    log = job.finish()
    assert "SIGUSR1: checkpoint saved after step 5" in log and "going on after step 5" in log
    assert Finished.read(tmp_path).differences(unbroken) == []
    slurm_log("USR1, requeued", job, went_on_after=5)
    written = job.run / "slurm" / f"{job.id}.1"
    environment = (written / "environment.txt").read_text().splitlines()
    assert {"HF_HUB_OFFLINE=1", "DO_NOT_TRACK=1", "MLFLOW_DISABLE_TELEMETRY=true", "SLURM_RESTART_COUNT=1"} <= set(environment)
    assert "NodeName=node2" in (written / "nodes.txt").read_text() and "torch==" in (written / "packages.txt").read_text()
    assert sorted(path.name for path in (written / "ranks").iterdir()) == ["node1", "node2"]
    assert (job.run / "finished").read_text() == "12\n" and (job.run / "code" / "slurm" / "lib.sh").exists()


@pytest.mark.slurm
def test_requeued_where_signals_reach_torchrun_alone(shards, database, unbroken, tmp_path):
    """As where Slurm follows processes by cgroups: training processes have sessions of their own, which this cluster loses sight of."""
    if reason := module.missing():
        pytest.skip(reason)
    with module.Cluster(nodes=2, settings="ProctrackType=proctrack/pgid") as cluster:
        job = start(cluster, tmp_path, shards, database)
        job.until_waiting()
        job.signal("--batch", "--signal=USR1")
        job.until_said("USR1: the training processes are to finish")
        time.sleep(LOOK_S)
        job.go_on()
        job.until(lambda: job.restarts() == 1, "requeued")
        log = job.finish()
    assert "SIGUSR1: finishing" not in log and "SIGUSR1: checkpoint saved after step 5" in log and "going on after step 5" in log
    assert Finished.read(tmp_path).differences(unbroken) == []


@pytest.mark.slurm
def test_the_cluster_has_no_route_out(cluster, tmp_path):
    """So that all of these tests show that jobs need no internet."""
    if os.geteuid() != 0:
        pytest.skip("a network namespace of its own needs root")
    routes = cluster.client("srun", "--nodes=3", "--ntasks-per-node=1", "cat", "/proc/net/route", cwd=tmp_path)
    assert {line.split()[0] for line in routes.splitlines()} <= {"Iface", "lo"}


@pytest.mark.slurm
def test_preempted(cluster, shards, database, unbroken, tmp_path, slurm_log):
    job = start(cluster, tmp_path, shards, database)
    job.until_waiting()
    job.times["signal"] = time.time()
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "-o", "/dev/null", "--wrap", "srun true", cwd=tmp_path)
    job.until_said("TERM: the training processes are to finish")
    job.go_on()
    job.until(lambda: job.restarts() == 1, "requeued")
    assert cluster.wait(urgent, START_S)["JobState"] == "COMPLETED"
    log = job.finish()
    assert "going on after step 5" in log and "Slurm has put the job back into the queue" in log
    assert Finished.read(tmp_path).differences(unbroken) == []
    assert attempts.read(job.run)[0].preempted
    slurm_log("preempted", job, went_on_after=5)


@pytest.mark.slurm
def test_preempted_where_preemption_cancels(cluster, shards, database, unbroken, tmp_path):
    job = start(cluster, tmp_path, shards, database, options=("--nodes=2", "--partition=cheap"))
    job.until_waiting()
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "-o", "/dev/null", "--wrap", "srun true", cwd=tmp_path)
    job.until_said("TERM: the training processes are to finish")
    job.go_on()
    job.until(lambda: job.restarts() == 1, "requeued")
    assert cluster.wait(urgent, START_S)["JobState"] == "COMPLETED"
    assert "going on after step 5" in job.finish()
    assert Finished.read(tmp_path).differences(unbroken) == []


@pytest.mark.slurm
def test_preempted_where_a_job_is_not_put_back(cluster, shards, database, unbroken, tmp_path):
    """Its successor is submitted before Slurm ends it."""
    options = ("--nodes=2", "--partition=cheap", "--no-requeue", "--job-name=a name")
    job = start(cluster, tmp_path, shards, database, options=options, env={"SBATCH_EXPORT": "ALL"})
    job.until_waiting()
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "-o", "/dev/null", "--wrap", "srun true", cwd=tmp_path)
    job.until_said("goes on in job ")
    job.go_on()
    assert job.wait()["JobState"] == "PREEMPTED" and cluster.wait(urgent, START_S)["JobState"] == "COMPLETED"
    job.id = re.findall(r"goes on in job (\d+)", job.log)[0]
    assert "going on after step 5" in job.finish()
    assert Finished.read(tmp_path).differences(unbroken) == []
    assert [found.preempted for found in attempts.read(job.run)] == [True, False]


@pytest.mark.slurm
def test_preempted_before_training_begins(cluster, shards, database, unbroken, tmp_path):
    """What Slurm's TERM ends then is no failure: the successor, which is submitted at once, stays."""
    options = ("--nodes=2", "--partition=cheap", "--no-requeue")
    waits = f"[ -e {tmp_path}/begins ] || {{ touch {tmp_path}/begins; sleep 600; }}"
    setup = f'python() {{ [[ $* != *pretrain.job\\ begin* ]] || {waits}; command python "$@"; }}; {environment(tmp_path)["QSPARSE_SETUP"]}'
    job = start(cluster, tmp_path, shards, database, fault="", options=options, env={"QSPARSE_SETUP": setup})
    job.until((tmp_path / "begins").exists, "begins")
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "-o", "/dev/null", "--wrap", "srun true", cwd=tmp_path)
    assert job.wait()["JobState"] == "PREEMPTED" and cluster.wait(urgent, START_S)["JobState"] == "COMPLETED"
    job.id = re.findall(r"goes on in job (\d+)", job.log)[0]
    assert "unbound variable" not in job.finish()
    assert Finished.read(tmp_path).differences(unbroken) == []


@pytest.mark.slurm
def test_a_grace_time_is_there_to_save(cluster, shards, database, unbroken, tmp_path):
    """A step and a save that take longer than torchrun waits by itself."""
    job = start(cluster, tmp_path, shards, database, options=("--nodes=2", "--partition=gentle"))
    job.until_waiting()
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", "-o", "/dev/null", "--wrap", "srun true", cwd=tmp_path)
    job.until_said("SIGTERM: finishing the step")
    time.sleep(GRACE_S + 3)
    job.go_on()
    job.until(lambda: job.restarts() == 1, "requeued")
    assert cluster.wait(urgent, START_S)["JobState"] == "COMPLETED"
    assert "going on after step 5" in job.finish()
    assert Finished.read(tmp_path).differences(unbroken) == []
    assert attempts.read(job.run)[0].preempted


@pytest.mark.slurm
def test_stopped_by_its_switch(cluster, shards, database, unbroken, tmp_path):
    """Not for good, and not as if it were done."""
    job = start(cluster, tmp_path, shards, database)
    job.until_waiting()
    (job.run / "STOP").touch()
    time.sleep(LOOK_S)
    job.go_on()
    assert (job.wait()["ExitCode"], job.restarts()) == ("75:0", 0) and "STOP is there: remove it and submit the job again" in job.log
    again = start(cluster, tmp_path, shards, database)
    assert (again.wait()["ExitCode"], again.restarts()) == ("75:0", 0)
    (job.run / "STOP").unlink()
    assert "going on after step 5" in start(cluster, tmp_path, shards, database, fault="").finish()
    assert Finished.read(tmp_path).differences(unbroken) == []


@pytest.mark.slurm
@pytest.mark.parametrize("how", ["none", "array"])
def test_nothing_starts_it_again(how, cluster, shards, database, tmp_path):
    """By its user's wish, or in the last element of an array: said, and not as if it were done."""
    options = ("--nodes=2", *(["--array=1-1%1"] if how == "array" else []))
    job = start(cluster, tmp_path, shards, database, options=options, env={"CONTINUE": how})
    job.until_waiting()
    job.warn()
    job.go_on()
    assert (job.wait()["ExitCode"], job.restarts()) == ("75:0", 0)
    (only,) = attempts.read(job.run)
    assert (only.outcome, only.ended_step) == ("stopped", 5) and only.reason.endswith(": submit the job again to go on")


@pytest.mark.slurm
def test_cancelled(cluster, shards, database, tmp_path):
    """By its user: it saves, and does not go on."""
    job = start(cluster, tmp_path, shards, database)
    job.until_waiting()
    job.signal()
    job.until(lambda: "TERM: the training processes are to finish" in job.log, "told", ended=True)
    job.go_on()
    assert job.wait()["JobState"] == "CANCELLED"
    (only,) = attempts.read(job.run)
    assert (only.outcome, only.ended_step, only.preempted) == ("stopped", 5, False) and job.restarts() == 0
    assert "stopped: the job was cancelled; TERM came; the newest complete checkpoint is of step 5" in job.log


@pytest.mark.slurm
def test_time_limit(cluster, shards, database, unbroken, tmp_path, slurm_log):
    """Slurm's own signal, which may come half a minute earlier than it was asked for."""
    job = start(cluster, tmp_path, shards, database, options=("--nodes=2", "--time=2", "--signal=B:USR1@30"))
    job.until_waiting()
    job.until_said("USR1: the training processes are to finish", timeout=2 * START_S)
    job.times["signal"] = time.time()
    job.go_on()
    job.until(lambda: job.restarts() == 1, "requeued")
    job.give_time()
    assert "going on after step 5" in job.finish()
    assert Finished.read(tmp_path).differences(unbroken) == []
    slurm_log("time limit near", job, went_on_after=5)


@pytest.mark.slurm
def test_at_the_time_limit_itself(cluster, shards, database, unbroken, tmp_path):
    """The signal before was lost, or the step and the save took longer than was left."""
    job = start(cluster, tmp_path, shards, database, options=("--nodes=2", "--time=1", "--signal=B:CONT@5"))
    job.until_waiting()
    job.until_said("TERM: the training processes are to finish", timeout=2 * START_S)
    job.go_on()
    job.until(lambda: job.restarts() == 1, "requeued")
    job.give_time()
    assert "going on after step 5" in job.finish()
    assert Finished.read(tmp_path).differences(unbroken) == []
    assert not attempts.read(job.run)[0].preempted, "starts that end so without a checkpoint count"


@pytest.mark.slurm
def test_srun_starts_every_rank(cluster, shards, database, unbroken, tmp_path):
    env = {"LAUNCHER": "srun", "PREFLIGHT": "1", "QSPARSE_PREFLIGHT_FRACTION": "0.25"}
    job = start(cluster, tmp_path, shards, database, env=env)
    job.until_waiting()
    job.signal("--batch", "--signal=USR1")
    job.until_said("USR1: the training processes are to finish")
    job.go_on()
    assert "going on after step 5" in job.finish()
    assert Finished.read(tmp_path).differences(unbroken) == []
    assert "step 12/12" in (job.run / "slurm" / f"{job.id}.1" / "ranks" / "0.log").read_text()


@pytest.mark.slurm
@pytest.mark.parametrize("how", ["array", "singleton"])
def test_goes_on_in_another_job(how, cluster, shards, database, unbroken, tmp_path):
    options = ("--nodes=2", *(["--array=1-3%1"] if how == "array" else []))
    # The successor begins on another node.
    env = {"CONTINUE": how, "QSPARSE_SBATCH": "--exclude=node1"} if how == "singleton" else {}
    job = start(cluster, tmp_path, shards, database, options=options, env=env)
    job.until_waiting()
    job.id = cluster.client("squeue", "-h", "-t", "RUNNING", "-o", "%A").strip()
    job.warn()
    job.go_on()
    deadline = time.monotonic() + 2 * START_S
    while cluster.client("squeue", "-h").strip():
        assert time.monotonic() < deadline, job.log
        time.sleep(0.2)
    assert "going on after step 5" in job.log and "finished: all 12 steps are done" in job.log
    assert Finished.read(tmp_path).differences(unbroken) == []
    starts = attempts.read(job.run)
    assert [(start.restart, start.chain) for start in starts] == [(0, starts[0].chain)] * 2 and starts[0].job != starts[1].job
    assert how == "array" or starts[1].nodes == ["node2", "node3"]
