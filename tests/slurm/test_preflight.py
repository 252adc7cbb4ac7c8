"""Nodes that are not fit are named, and left out of the next start."""

import os

import pytest

from pretrain.job import attempts
from tests.slurm.faults import hidden, slowed
from tests.slurm.jobs import START_S, flags, submit

QUIET = {"QSPARSE_PREFLIGHT_FRACTION": "0.25"}
"""The nodes share the cores of one machine, which may be busy: half as fast as usual is nothing there."""


@pytest.mark.slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="hiding a folder from one node needs root")
def test_a_slow_node_and_one_that_cannot_read_the_data(cluster, shards, tmp_path):
    given = flags(tmp_path, shards, "--tracking.enabled", "false", "--train.micro_batch_size", 4, "--train.global_batch_size", 24)
    with hidden(cluster, "node3", shards), slowed(cluster, "node2", "pretrain.preflight"):
        job = submit(cluster, tmp_path, *given, options=("--nodes=1-3",), env={"PREFLIGHT": "1"} | QUIET)
        job.until(lambda: job.restarts() == 1, "requeued", timeout=2 * START_S)
    log = job.finish()
    assert "bad node: node2: CPU process 0 computes slowly: " in log and "bad node: node3: cannot read the manifest " in log
    assert "bad node: node1" not in log and ": 2 bad: node2 node3" in log
    assert "excluded from the next start: node2,node3" in log and cluster.job(job.id)["ExcNodeList"] in ("node2,node3", "node[2-3]")
    assert "preflight: 1 node, " in log
    first, second = attempts.read(job.run)
    assert (first.outcome, first.reason.split(";")[0], second.nodes) == ("again", "preflight: node2 node3", ["node1"])


@pytest.mark.slurm
def test_a_node_that_hangs(cluster, tmp_path):
    """The others do not wait for it longer than they should, and it is named."""
    with slowed(cluster, "node3", "pretrain.preflight", stopped_s=3600):
        job = submit(
            cluster,
            tmp_path,
            "--device",
            "cpu",
            script="preflight.sh",
            options=("--nodes=3",),
            env={"QSPARSE_PREFLIGHT_WAIT": "75"} | QUIET,
        )
        found = job.wait(2 * START_S)
    assert found["JobState"] == "FAILED" and found["ExitCode"] == "3:0", job.log
    assert "bad node: node3: did not " in job.log and ": 1 bad: node3" in job.log
    assert (tmp_path / "runs" / ".preflight" / job.id / "bad").read_text() == "node3\n"


@pytest.mark.slurm
def test_a_flag_that_there_is_not_is_no_fault_of_a_node(cluster, tmp_path):
    job = submit(cluster, tmp_path, "--foo", "bar", script="preflight.sh", options=("--nodes=2",), env=QUIET)
    assert job.wait()["ExitCode"] == "2:0" and "unrecognized arguments: --foo" in job.log and "bad node" not in job.log


@pytest.mark.slurm
def test_a_look_without_training(cluster, shards, tmp_path):
    job = submit(
        cluster, tmp_path, "--device", "cpu", script="preflight.sh", options=("--nodes=3",), env={"QSPARSE_DATA": str(shards)} | QUIET
    )
    log = job.finish()
    assert "preflight: 3 nodes, " in log and ": all good | all-reduce " in log and "pairs GB/s" in log
