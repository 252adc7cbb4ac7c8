"""Losses and gradients that are not finite: the step changes nothing, the batch is named and kept, and the run does not go on for ever."""

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_tools.reader import TokenDataset
from tests.pretrain.launch import journal, losses, started, train, train_command
from tests.pretrain.test_resume import tensors

BATCH = ["--train.micro_batch_size", 2, "--train.global_batch_size", 8, "--validation.samples", 8]


def test_after_so_many_steps_without_finite_numbers_the_run_stops_and_the_batches_are_kept(shards, tmp_path):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, *BATCH, "--train.precision", "fp32", "--checkpoint.interval", 2, "--output_dir", run]
    train(*arguments, "--train.steps", 2)
    # After one step at this learning rate no weight is of any use.
    broken = [*arguments, "--train.steps", 50, "--optimizer.lr", "1e30", "--train.max_skipped_steps", 4]
    with started(train_command(*broken, "--allow_change", "train,optimizer")) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "step 4: loss nan" in output and "the weights stay as they were (1 of 4 in a row)" in output
    assert "error: 4 steps in a row without a finite loss and gradient, the last one step 7: loss nan" in output
    assert "Traceback (most" not in output
    assert journal(run)[-1]["train/skipped_steps"] >= 3 and max(losses(run)) <= 7
    kept = sorted((run / "skipped").iterdir())
    assert [path.name for path in kept] == [f"step_{step:08d}.npz" for step in (4, 5, 6, 7)]
    expected = next(iter(DataLoader(TokenDataset(shards, "train", 32, 0, 8, 8, consumed_samples=24), batch_size=None)))
    with np.load(kept[0]) as found:
        assert np.array_equal(found["tokens"], expected["tokens"].numpy()) and np.isnan(found["loss"])
        assert np.array_equal(found["sample_ids"], expected["sample_ids"].numpy())
    # What was saved before is as good as it was, and the run can go on from it.
    (run / "checkpoints" / "step_00000004").rename(tmp_path / "spoilt")
    for path in (run / "checkpoints").glob("step_0000000[5-9]"):
        path.rename(tmp_path / path.name)
    assert "going on after step 2" in train(*arguments, "--train.steps", 4, "--allow_change", "train.steps")
    assert all(torch.isfinite(tensor).all() for tensor in tensors(run / "checkpoints" / "step_00000004").values())
