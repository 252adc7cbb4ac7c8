"""A run that was stopped and started again is the unbroken run, bit for bit."""

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_tools.reader import TokenDataset
from pretrain.checkpoint.tensors import read_tensors
from pretrain.going_on import Beginning
from pretrain.resume import _state
from tests.pretrain.launch import TIMEOUT_S, fail, journal, losses, signal_workers, started, train, train_command, training, wait_for_step

STEPS = 20
# 2 processes x 2 samples x 4 micro-batches.
BATCH = ["--train.micro_batch_size", 2, "--train.global_batch_size", 16, "--train.steps", STEPS, "--validation.samples", 16]
CASES = {
    # The second stage of the schedule, another learning rate and no weight decay, begins at step 10, where the run is broken.
    "bf16 bitnet_qsparse": [
        *("--train.precision", "bf16", "--bitnet.enabled", "true", "--bitnet.subln", "true", "--qsparse.keep", "0.4"),
        *("--schedule.kind", "two_stage", "--schedule.second_lr", "1e-3", "--optimizer.lr", "3e-3"),
    ],
    # The warm-up ends and the final decay begins after the restart.
    "fp32 qsparse": [
        *("--train.precision", "fp32", "--qsparse.keep", "0.4", "--optimizer.lr", "3e-3"),
        *("--schedule.kind", "wsd", "--schedule.warmup_steps", "11", "--schedule.decay_steps", "6"),
    ],
}


SIGNALS = {"bf16 bitnet_qsparse": signal.SIGTERM, "fp32 qsparse": signal.SIGUSR1}


@pytest.mark.parametrize("case", CASES)
def test_stopped_by_a_signal_and_started_again(case, shards, tmp_path):
    arguments = ["--data.path", shards, *BATCH, *CASES[case], "--checkpoint.interval", 10]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    # The unbroken run waits for its files, the others train on meanwhile: no bit may depend on it.
    train(*arguments, "--output_dir", straight, "--checkpoint.asynchronous", "false")
    assert sorted(losses(straight)) == list(range(1, STEPS + 1))
    samples = TokenDataset(shards, "train", 32, seed=0, micro_batch_size=2, global_batch_size=16)
    assert 10 * 16 < samples.epoch_samples < STEPS * 16, "the second half must pass the end of the epoch"
    saved = json.loads((straight / "checkpoints" / "step_00000020" / "trainer.json").read_text())
    assert saved["identity"]["kept.layers.0.mlp.down"] == [6, 8, 128] and saved["identity"]["model.num_layers"] == 2

    # 10 + restart + 10: what the unbroken run did after its checkpoint of step 10 is taken away.
    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoints" / "step_00000020")
    output = train(*arguments, "--output_dir", broken, *(["--train.check_codes", "true"] if "bitnet" in case else []))
    assert "going on after step 10, 160 samples" in output
    assert losses(broken) == losses(straight)
    assert [entry["step"] for entry in journal(broken)] == [entry["step"] for entry in journal(straight)]
    _assert_same_state(straight, broken)

    # Stopped by a signal, which also saves between two intervals. torchrun passes SIGTERM on to its processes, and ends with an
    # error of its own; SIGUSR1 it does not know, so that goes to the processes.
    signalled, number, answered = tmp_path / "signalled", SIGNALS[case], tmp_path / "answered"
    command = train_command(*arguments, "--output_dir", signalled)
    command.insert(command.index("pretrain.train"), "tests.pretrain.holding")
    with started(command, env={"HOLD": f"5,{answered}", "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        wait_for_step(process, signalled, 5)
        process.send_signal(number) if number is signal.SIGTERM else signal_workers(process, number)
        output = ""
        for line in process.stdout:
            output += line
            if line.startswith(f"{number.name}: finishing"):
                answered.touch()
        process.wait()
    assert (process.returncode == 0) is (number is signal.SIGUSR1), output
    assert f"{number.name}: checkpoint saved after step" in output
    assert max(losses(signalled)) < STEPS, "the run had ended before the signal came"
    train(*arguments, "--output_dir", signalled)
    assert losses(signalled) == losses(straight)
    _assert_same_state(straight, signalled)


def _assert_same_state(first: Path, second: Path) -> None:
    first, second = (run / "checkpoints" / f"step_{STEPS:08d}" for run in (first, second))
    expected, found = read_tensors(first), read_tensors(second)
    assert expected.keys() == found.keys() and any(name.startswith("optimizer.exp_avg_sq.") for name in expected)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert (first / "trainer.json").read_text() == (second / "trainer.json").read_text()


def test_a_checkpoint_cut_in_half_is_passed_over_and_that_is_said(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, *BATCH, "--train.precision", "fp32", "--checkpoint.interval", 10, "--output_dir", run]
    train(*arguments)
    expected = losses(run)
    largest = max((run / "checkpoints" / "step_00000020" / "state").iterdir(), key=lambda path: path.stat().st_size)
    with largest.open("rb+") as file:
        file.truncate(largest.stat().st_size // 2)
    output = train(*arguments)
    assert f"{run / 'checkpoints' / 'step_00000020'} is not a complete checkpoint" in output and largest.name in output
    assert "going on after step 10" in output
    assert losses(run) == expected
    assert "is complete: 20 of 20 steps are done" in train(*arguments)


@dataclass(frozen=True)
class KnownOwner:
    """The token of the run directory's owner, which names its unfinished checkpoints, is known beforehand."""

    def __call__(self, rank: int) -> None:
        import pretrain.lease

        pretrain.lease.secrets = SimpleNamespace(token_hex=lambda nbytes: "cafe")


def test_a_save_that_fails_ends_the_run_and_leaves_the_checkpoints_before_it(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, *BATCH, "--checkpoint.interval", 2, "--output_dir", run]
    train(*arguments, "--train.steps", 2)
    # begin() removes what interrupted saves left, folders: a file in that place is an error of the file system.
    partial = run / "checkpoints" / "step_00000004.cafe.partial"
    partial.write_text("in the way")
    arguments += ["--allow_change", "train.steps"]
    with training(*arguments, "--train.steps", 50, "--checkpoint.max_failures", 1, before=KnownOwner()) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 1 and f"{partial.name}/state was not written: rank 0: NotADirectoryError" in output, output
    assert 4 <= max(losses(run)) < 50, "training went on until the failure was known, and no further"
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == ["step_00000002"]
    partial.unlink()
    assert "going on after step 2" in train(*arguments, "--train.steps", 4)


def test_another_schedule_must_be_asked_for(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, *BATCH, "--train.steps", 2, "--output_dir", run]
    train(*arguments, "--resume", "never", processes=1)
    changed = [*arguments, "--train.steps", 3, "--optimizer.lr", "1e-3", "--train.micro_batch_size", 4, "--resume", "required"]
    assert "--allow_change train.steps,optimizer.lr" in fail(*changed, processes=1)
    output = train(*changed, "--allow_change", "train.steps,optimizer", processes=1)
    assert "changed: optimizer.lr: 0.0003 in the checkpoint, 0.001 now" in output and "going on after step 2" in output
    assert "changed: train.micro_batch_size: 2 in the checkpoint, 4 now" in output
    for resume, where, told in (("never", run, "holds checkpoints and resume=never"), ("required", tmp_path, "resume=required")):
        output = fail(*arguments, "--output_dir", where, "--resume", resume, processes=1)
        assert told in output and "Traceback (most" not in output


def test_a_checkpoint_of_another_model_is_refused_in_words(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, *BATCH, "--train.steps", 2, "--output_dir", run]
    train(*arguments)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    output = fail(*arguments, "--train.steps", 4, "--qsparse.keep", "0.5")
    assert "belongs to a different run" in output and "qsparse" in output and "choose another output_dir" in output
    assert "rank 1" not in output, "what all ranks know is told once"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert json.loads((run / "checkpoints" / "step_00000002" / "trainer.json").read_text())["state"]["step"] == 2


def test_a_state_that_nobody_here_has_written_is_refused_in_words():
    state = {"step": 3, "consumed_samples": 24, "flops": 1, "recent_losses": [1.0]}
    assert _state(Beginning(checkpoint=Path("here"), state=state)).consumed_samples == 24
    with pytest.raises(ValueError, match="here: trainer.json was not written .* its state has a wrong consumed_samples, more"):
        _state(Beginning(checkpoint=Path("here"), state=state | {"consumed_samples": "24", "more": 1}))
