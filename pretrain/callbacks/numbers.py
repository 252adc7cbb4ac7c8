"""Steps whose loss or gradient is not finite: told, with the samples that were in them, and the end of the run after too many in a row."""

import math

import torch.distributed as dist

from pretrain.callbacks.batches import BatchFolder
from pretrain.trainer import Callback, StepReport, Stopped, Trainer
from pretrain.validate import Validated

FOLDER = "skipped"


class WatchNumbers(Callback):
    """Every rank counts alike; rank 0 tells, and keeps the batch in RUN_DIR/skipped."""

    doing = "looking for numbers that are not finite"

    def __init__(self, run: Validated):
        self.run, self.allowed = run, run.config.train.max_skipped_steps
        self.batches = BatchFolder(run, FOLDER)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Sets `report.failure` to Stopped after `train.max_skipped_steps` in a row."""
        state, result = trainer.state, report.result
        if result.applied and math.isfinite(result.loss):
            state.skipped_in_a_row = 0
            return
        state.skipped_in_a_row += 1
        report.metrics["train/skipped_in_a_row"] = state.skipped_in_a_row
        first = state.consumed_samples - self.run.config.train.global_batch_size
        told = f"step {report.step}: loss {result.loss}, gradient norm {result.grad_norm}"
        if dist.get_rank() == 0:
            path = self.batches.keep(report, first)
            print(
                f"warning: {told}: the weights stay as they were ({state.skipped_in_a_row} of {self.allowed} in a row). Its batch, "
                f"samples {first:,} to {state.consumed_samples - 1:,} of the run, {f'is in {path}' if path else 'is not kept'}", flush=True,
            )  # fmt: skip
        if state.skipped_in_a_row >= self.allowed:
            report.failure = Stopped(
                f"{state.skipped_in_a_row} steps in a row without a finite loss and gradient, the last one {told}: look at the "
                f"batches in {self.batches.path}, or lower optimizer.lr and start again with --allow_change optimizer.lr; checkpoints from "
                "before are as they were"
            )
