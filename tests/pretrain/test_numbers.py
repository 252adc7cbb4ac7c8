"""Losses and gradients that are not finite: the step changes nothing, the batch is named and kept, and the run does not go on for ever."""

from dataclasses import dataclass
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_tools.reader import TokenDataset
from pretrain.checkpoint.tensors import read_tensors
from tests.pretrain.launch import TIMEOUT_S, journal, losses, train, training

BATCH = ["--train.micro_batch_size", 2, "--train.global_batch_size", 8, "--validation.samples", 8]


def test_after_so_many_steps_without_finite_numbers_the_run_stops_and_the_batches_are_kept(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, *BATCH, "--train.precision", "fp32", "--checkpoint.interval", 2, "--output_dir", run]
    train(*arguments, "--train.steps", 2)
    # After one step at this learning rate no weight is of any use: activations overflow, and gradients with them.
    broken = [*arguments, "--train.steps", 50, "--optimizer.lr", "1e30", "--train.max_skipped_steps", 4]
    with training(*broken, "--allow_change", "train,optimizer") as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 1
    assert "warning: step 4: loss 6.2" in output and "gradient norm inf: the weights stay as they were (1 of 4 in a row)" in output
    assert "error: 4 steps in a row without a finite loss and gradient, the last one step 7: loss 6.2" in output
    assert "Traceback (most" not in output
    last = journal(run)[-1]
    assert (last["step"], last["train/skipped_steps"], last["train/skipped_in_a_row"]) == (7, 4, 4) and last[
        "train/grad_norm"
    ] == "Infinity"
    kept = sorted((run / "skipped").iterdir())
    assert [path.name for path in kept] == [f"step_{step:08d}.npz" for step in (4, 5, 6, 7)]
    expected = next(iter(DataLoader(TokenDataset(shards, "train", 32, 0, 8, 8, consumed_samples=24), batch_size=None)))
    with np.load(kept[0]) as found:
        assert np.array_equal(found["tokens"], expected["tokens"].numpy()) and np.isinf(found["grad_norm"])
        assert np.array_equal(found["sample_ids"], expected["sample_ids"].numpy())
    # What was saved before is as good as it was, nothing of the broken run has taken its place, and the run can go on from it.
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert "going on after step 2" in train(*arguments, "--train.steps", 4, "--allow_change", "train.steps")
    assert all(torch.isfinite(tensor).all() for tensor in read_tensors(run / "checkpoints" / "step_00000004").values())


@dataclass(frozen=True)
class SpoilLoss:
    """Adds `value` to the losses of one micro-batch of one step on rank 1; its gradients stay finite."""

    step: int
    value: float

    def __call__(self, rank: int) -> None:
        import megatron_qsparse.parallel.schedule as schedule

        if rank != 1:
            return
        count, original = 0, schedule._mean_loss

        def spoilt(losses_of_batch):
            nonlocal count
            count += losses_of_batch.requires_grad
            return original(losses_of_batch + (self.value if count == 2 * self.step else 0.0))

        mock.patch.object(schedule, "_mean_loss", spoilt).start()


def test_a_step_whose_loss_alone_is_not_finite_is_left_out_and_its_checkpoint_written_after_the_next(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, *BATCH, "--train.steps", 5, "--checkpoint.interval", 3, "--output_dir", run]
    with training(*arguments, before=SpoilLoss(3, float("inf"))) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, output
    assert "warning: step 3: loss inf, gradient norm inf: the weights stay as they were (1 of 10 in a row)" in output
    assert losses(run)[3] == "Infinity" and all(isinstance(losses(run)[step], float) for step in (1, 2, 4, 5))
    assert journal(run)[-1]["train/skipped_steps"] == 1
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]


def _spoil(rank: int) -> None:
    """One master weight of rank 0, behind the optimizer's back, as a faulty memory would."""
    from megatron_qsparse.parallel.zero import ZeroEngine

    step = ZeroEngine.train_step

    def spoiling(engine, *args):
        result = step(engine, *args)
        if rank == 0:
            next(engine.master_shards()).data.view(-1)[0] = torch.inf
        return result

    mock.patch.object(ZeroEngine, "train_step", spoiling).start()


@pytest.mark.parametrize("stage", [1, 3])
def test_weights_that_a_finite_gradient_has_spoilt_are_not_saved(shards, tmp_path, stage):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, *BATCH, "--train.steps", 4, "--checkpoint.interval", 1, "--zero.stage", stage, "--output_dir", run]
    with training(*arguments, before=_spoil) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 1
    assert "error: a weight is not finite, though no gradient was: no checkpoint is written of it (there is no complete one yet)" in output
    assert not list((run / "checkpoints").glob("step_*"))
