"""Jobs that are given as many nodes as there are (--nodes=MIN-MAX)."""

import json

import pytest

from pretrain.job import attempts
from tests.pretrain.finished import start
from tests.pretrain.killing import STEPS, consumed
from tests.pretrain.launch import TIMEOUT_S, losses
from tests.slurm.jobs import flags, submit, tracked

BATCH = ("--train.micro_batch_size", 2, "--train.global_batch_size", 24, "--train.precision", "fp32", "--bitnet.enabled", "false",
         "--bitnet.subln", "false")  # fmt: skip


@pytest.mark.slurm
def test_three_nodes_then_two_then_three(cluster, shards, database, tmp_path):
    """The samples of every step are those of one process, and so are the losses, but for the order of the sums."""
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    alone.mkdir(), spread.mkdir()
    with start(alone, shards, *BATCH, "--tracking.enabled", "false", processes=1) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, output
    env = tracked(spread, database, TEST_FAULT="0 wait 5 0,0 wait 9 1")
    job = submit(cluster, spread, *flags(spread, shards, *BATCH), options=("--nodes=2-3",), env=env)
    for restart, state in ((0, "drain"), (1, "resume")):
        job.until_waiting(restart)
        cluster.client("scontrol", "update", "nodename=node3", f"state={state}", *(["reason=test"] if state == "drain" else []))
        job.signal("--batch", "--signal=USR1")
        job.until(lambda: job.log.count("USR1: the training processes are to finish") == restart + 1, "told")  # noqa: B023
        job.go_on(restart)
        job.until(lambda: job.restarts() == restart + 1, "requeued")  # noqa: B023
    log = job.finish()
    assert [len(start.nodes) for start in attempts.read(job.run)] == [3, 2, 3]
    assert "2 processes now, 3 before: 2 data-parallel ranks; global batch and order of the samples stay" in log
    found, expected = consumed(spread / "samples.jsonl"), consumed(alone / "samples.jsonl")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert {step: sorted(ids) for step, ids in found.items()} == {step: sorted(ids) for step, ids in expected.items()}
    assert losses(job.run) == pytest.approx(losses(alone / "run"), abs=2e-5)
    tags = json.loads((job.run / "run.json").read_text())["tags"]
    assert [tags[f"{prefix}slurm.job_num_nodes"] for prefix in ("", "resume.1.", "resume.2.")] == ["3", "2", "3"]
    assert [tags[f"{prefix}slurm.restart_count"] for prefix in ("", "resume.1.", "resume.2.")] == ["0", "1", "2"]


@pytest.mark.slurm
def test_a_node_too_many_stays_idle(cluster, shards, tmp_path):
    """8 samples a step divide among two nodes, not three."""
    batch = ("--train.micro_batch_size", 4, "--train.global_batch_size", 8, "--tracking.enabled", "false")
    job = submit(cluster, tmp_path, *flags(tmp_path, shards, *batch), options=("--nodes=2-3",))
    log = job.finish()
    assert "2 of 3 nodes train, 2 data-parallel ranks: the global batch of 8 does not divide among more; node3 stays idle" in log
    assert attempts.read(job.run)[0].processes == 2 and "finished: all 12 steps are done" in log
