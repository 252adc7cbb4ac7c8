"""Steps whose loss or gradient is not finite: told, with the samples that were in them, and the end of the run after too many in a row."""

import math
from pathlib import Path

import numpy as np
import torch.distributed as dist

from data_tools.reader import TokenDataset
from pretrain.trainer import Callback, StepReport, Stopped, Trainer
from pretrain.validate import Validated

FOLDER = "skipped"
MAX_KEPT = 10
"""Batches that are kept in a run directory."""


class WatchNumbers(Callback):
    """Every rank counts alike; rank 0 tells, and keeps the batch in RUN_DIR/skipped/step_N.npz.

    The file holds sample_ids int64 [global batch] (indices of `data_tools.reader.TokenStore`), tokens int64 [global batch,
    sequence_length + 1], loss and grad_norm.
    """

    def __init__(self, run: Validated):
        self.run, self.allowed = run, run.config.train.max_skipped_steps

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Raises Stopped after `train.max_skipped_steps` in a row."""
        state, result = trainer.state, report.result
        if result.applied and math.isfinite(result.loss):
            state.skipped_in_a_row = 0
            return
        state.skipped_in_a_row += 1
        first = state.consumed_samples - self.run.config.train.global_batch_size
        told = f"step {report.step}: loss {result.loss}, gradient norm {result.grad_norm}"
        if dist.get_rank() == 0:
            done = "the weights stay as they were" if not result.applied else "its update was applied"
            path = self._keep(report, first)
            print(
                f"warning: {told}: {done} ({state.skipped_in_a_row} of {self.allowed} in a row). Its batch, samples {first:,} to "
                f"{state.consumed_samples - 1:,} of the run, {f'is in {path}' if path else 'is not kept'}", flush=True,
            )  # fmt: skip
        if state.skipped_in_a_row >= self.allowed:
            raise Stopped(
                f"{state.skipped_in_a_row} steps in a row without a finite loss and gradient, the last one {told}: lower optimizer.lr or "
                f"look at the batches in {self.run.config.run_directory / FOLDER}; checkpoints from before are still there"
            )

    def _keep(self, report: StepReport, first: int) -> Path | None:
        """None where there are enough already, or no room."""
        config = self.run.config
        folder = config.run_directory / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            path = folder / f"step_{report.step:08d}.npz"
            if len(list(folder.glob("*.npz"))) >= MAX_KEPT and not path.exists():
                return None
            size = config.train.global_batch_size
            dataset = TokenDataset(
                config.data.path, "train", config.data.sequence_length, config.train.seed, size, size,
                consumed_samples=first, window_shards=config.data.window_shards,
            )  # fmt: skip
            batch = next(iter(dataset))
            np.savez(
                path, sample_ids=batch["sample_ids"].numpy(), tokens=batch["tokens"].numpy(), loss=report.result.loss,
                grad_norm=report.result.grad_norm,
            )  # fmt: skip
        except OSError as error:
            print(f"warning: the batch could not be kept: {error}", flush=True)
            return None
        return path
