"""`python -m pretrain.plan` on run directories: it says what the run then does."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain import plan
from pretrain.lease import FOLDER, Owner
from tests.pretrain.launch import TINY, fail, train
from tests.pretrain.test_disk import CHECKPOINT_MIB, tmpfs

SETTINGS = ["--train.micro_batch_size", 1, "--train.global_batch_size", 4, "--validation.samples", 4, "--train.steps", 4]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("outlook") / "run"
    saved = ["--checkpoint.interval", 2, "--checkpoint.milestone_interval", 4]
    train("--data.path", shards, *SETTINGS, *saved, "--output_dir", run, processes=1)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def planned(shards, capsys):
    """Exit status and output of a plan for a run directory."""

    def call(directory: Path, *changes: object) -> tuple[int, str]:
        arguments = [*TINY, "--data.path", shards, *SETTINGS, "--output_dir", directory, *changes]
        status = plan.main([str(argument) for argument in arguments])
        return status, capsys.readouterr().out

    return call


MORE = ["--train.steps", 6, "--allow_change", "train.steps"]


def test_new_going_on_and_complete(run, planned, shards, tmp_path):
    status, out = planned(tmp_path / "new")
    assert status == 0 and "new, at step 0" in out and "no problems found: this run can start" in out and not (tmp_path / "new").exists()
    status, out = planned(tmp_path / "new", "--checkpoint.start_from", run)
    assert status == 0 and f"new, at step 0, with the weights of {run / 'checkpoints' / 'step_00000004'}" in out
    status, out = planned(run)
    assert status == 0 and "is complete: 4 of 4 steps are done" in out and "no problems found: this run is complete" in out
    (run / "checkpoints" / "step_00000004" / "trainer.json").unlink()
    status, out = planned(run, *MORE)
    assert status == 0 and f"goes on after step 2 of 6 from {run / 'checkpoints' / 'step_00000002'}" in out
    assert "step_00000004 is not a complete checkpoint (trainer.json is missing)" in out
    assert any(line.split() == "changed train.steps: 4 in the checkpoint, 6 now".split() for line in out.splitlines())
    output = train("--data.path", shards, *SETTINGS, *MORE, "--output_dir", run, processes=1)
    assert "going on after step 2" in output and "changed: train.steps: 4 in the checkpoint, 6 now" in output


def _damage_all(run: Path) -> None:
    for path in (run / "checkpoints").glob("step_*/trainer.json"):
        path.unlink()


def _keep_milestones(run: Path) -> None:
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)


def _leave(run: Path, **changes: object) -> None:
    (run / FOLDER).mkdir()
    (run / FOLDER / "000001.json").write_bytes(dataclasses.replace(Owner.here(), **changes).encode())


REFUSALS = {
    "another identity": (lambda run: None, ["--train.seed", 7], "train.seed: 0 in the checkpoint, 7 now"),
    "another schedule": (lambda run: None, ["--train.steps", 6], "--allow_change train.steps"),
    "never": (lambda run: None, ["--resume", "never"], "holds checkpoints and resume=never"),
    "required": (shutil.rmtree, ["--resume", "required"], "holds no checkpoint and resume=required"),
    "damaged": (_damage_all, [], "is damaged: restore one, or move the directory away to start over"),
    "milestones": (_keep_milestones, [], "holds milestones, the last of step 4, but no checkpoint to go on from"),
    "in use": (_leave, [], "is in use by process"),
    "foreign settings": (
        lambda run: (run / "checkpoints/step_00000004/config.yaml").write_bytes(
            b"#" * (run / "checkpoints/step_00000004/config.yaml").stat().st_size
        ),
        [], "config.yaml is no configuration of this project",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_what_would_be_refused_is_a_problem(reason, run, planned):
    harm, changes, words = REFUSALS[reason]
    harm(run)
    status, out = planned(run, *changes)
    assert status == 2 and "1 problem found" in out
    problem = out.partition("problem: ")[2]
    assert words in problem and "this run can start" not in out


@pytest.mark.parametrize("reason", ["another identity", "milestones"])
def test_the_run_is_refused_in_the_same_words(reason, shards, run, planned):
    harm, changes, _ = REFUSALS[reason]
    harm(run)
    problem = planned(run, *changes)[1].partition("problem: ")[2].rpartition("1 problem found")[0].splitlines()
    output = fail("--data.path", shards, *SETTINGS, *changes, "--output_dir", run, processes=1)
    assert [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")] == problem


def test_an_owner_elsewhere_may_live(run, planned):
    _leave(run, machine="elsewhere", host="node7", pid=4242)
    status, out = planned(run, *MORE)
    assert status == 0 and "warning: " in out and "belongs to process 4242 on node7" in out and "sign of life for up to 75 s" in out
    assert json.loads((run / FOLDER / "000001.json").read_text())["host"] == "node7"


def test_a_disk_too_small_is_a_warning(planned, tmp_path):
    arguments = ["--train.precision", "fp32", "--checkpoint.keep_last", 1]
    with tmpfs(tmp_path / "disk", 2.5 * CHECKPOINT_MIB) as disk:
        status, out = planned(disk / "run", *arguments)
        assert status == 0 and "for 2 checkpoints," in out and "too small" not in out
        status, out = planned(disk / "run", *arguments, "--checkpoint.milestone_interval", 1)
        assert status == 0 and "for 2 checkpoints and 4 more milestones" in out
        assert f"warning: the disk of {disk / 'run'} is too small" in out and "raise checkpoint.milestone_interval" in out


def test_it_answers_quickly_and_without_torch(run, shards):
    """Processor time: the machine may be busy."""
    arguments = [str(part) for part in (*TINY, "--data.path", shards, *SETTINGS, *MORE, "--output_dir", run)]
    code = f"import sys; from pretrain import plan; assert plan.main({arguments!r}) == 0; assert 'torch' not in sys.modules"
    before, started = os.times(), time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 2 and time.monotonic() - started < 60
