"""What a user gets wrong: one clear line in the job's log, an exit status that is not 0, and no second start."""

import os

import pytest

from tests.slurm.jobs import flags, submit


@pytest.fixture
def refused(cluster, shards, tmp_path):
    """Submit, and return the job's log once Slurm says that it failed for good."""

    def run(*more: object, all_flags: list | None = None, **options) -> str:
        given = flags(tmp_path, shards, "--tracking.enabled", "false", *more) if all_flags is None else all_flags
        job = submit(cluster, tmp_path, *given, **options)
        found = job.wait(60)
        assert found["JobState"] == "FAILED" and found["ExitCode"] != "0:0" and found["Restarts"] == "0", f"{found}\n{job.log}"
        assert "Traceback" not in job.log
        return job.log

    return run


def errors(log: str) -> list[str]:
    return [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]


def test_no_data_path(refused):
    log = refused(all_flags=["--device", "cpu", "--model.vocab_size", 512])
    assert errors(log) == ["data.path is not set: name a directory made by `python -m data_tools tokenize`"]


def test_an_unreadable_manifest(refused, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text("{")
    (found,) = errors(refused("--data.path", tmp_path / "data"))
    assert found.startswith("data.path: ") and "manifest.json" in found


def test_more_gpus_than_the_plan_divides(refused):
    (found,) = errors(refused("--train.global_batch_size", 6, "--train.micro_batch_size", 1, env={"QSPARSE_PROCESSES_PER_NODE": "4"}))
    assert "train.global_batch_size=6 is not a multiple of train.micro_batch_size=1 * 8 data-parallel ranks = 8" in found


def test_an_unknown_override(refused):
    (found,) = errors(refused("--optimizer.learning_rate", "1e-3"))
    assert found.startswith("no setting optimizer.learning_rate")


def test_an_address_that_does_not_resolve(refused):
    (found,) = errors(refused(env={"MASTER_ADDR": "no-such-host"}))
    assert found.startswith("MASTER_ADDR=no-such-host does not resolve on node1")


@pytest.mark.parametrize(
    ("env", "options", "told"),
    [
        ({"CONTINUE": "requeu"}, ("--nodes=2",), "CONTINUE=requeu does not exist: use requeue, array, singleton or none"),
        ({"CONTINUE": "array"}, ("--nodes=2",), "CONTINUE=array: this job has no further elements, submit it with --array=1-20%1"),
    ],
)
def test_a_way_to_go_on_that_there_is_not(env, options, told, refused):
    """Said at once, not after days of training."""
    assert errors(refused(env=env, options=options)) == [told]


@pytest.mark.slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a file system needs root")
def test_a_full_disk(cluster, shards, tmp_path):
    """There is room for the beginning, and none for a checkpoint."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(cluster.small_disk)
    job = submit(cluster, tmp_path, *flags(tmp_path, shards, "--tracking.enabled", "false"))
    found = job.wait(100)
    assert found["JobState"] == "FAILED" and found["Restarts"] == "0", job.log
    assert "No space left on device" in job.log
    assert "checkpoints in a row could not be written" in job.log.splitlines()[-1] and " failed: " in job.log.splitlines()[-1]
