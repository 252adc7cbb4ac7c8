"""Batches that something was wrong with, kept for whoever looks for the reason."""

import contextlib
from pathlib import Path

import numpy as np

from data_tools.reader import TokenDataset
from pretrain.trainer import StepReport
from pretrain.validate import Validated

MAX_KEPT = 10
"""Batches in one folder: the last ones."""


class BatchFolder:
    """RUN_DIR/NAME/step_N.npz. For rank 0.

    A file holds sample_ids int64 [global batch] (indices of `data_tools.reader.TokenStore`), tokens int64 [global batch,
    sequence_length + 1], loss and grad_norm.
    """

    def __init__(self, run: Validated, name: str):
        self.run, self.path = run, run.config.run_directory / name

    def keep(self, report: StepReport, first: int) -> Path | None:
        """Write the samples from `first` on, of all ranks; None where that cannot be done."""
        config = self.run.config
        path = self.path / f"step_{report.step:08d}.npz"
        beside = self.path / f".{path.name}"
        try:
            self.path.mkdir(exist_ok=True)
            size = config.train.global_batch_size
            dataset = TokenDataset(
                config.data.path, "train", config.data.sequence_length, config.train.seed, size, size,
                consumed_samples=first, window_shards=config.data.window_shards,
            )  # fmt: skip
            batch = next(iter(dataset))
            with beside.open("wb") as file:
                np.savez(
                    file, sample_ids=batch["sample_ids"].numpy(), tokens=batch["tokens"].numpy(), loss=report.result.loss,
                    grad_norm=report.result.grad_norm,
                )  # fmt: skip
            beside.replace(path)
            # By age: a run that went back comes to steps again that are later ones of before.
            others = sorted((old for old in self.path.glob("step_*.npz") if old != path), key=lambda old: old.stat().st_mtime_ns)
            for old in others[: max(0, len(others) + 1 - MAX_KEPT)]:
                old.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            # The shards may have been replaced meanwhile; a diagnosis must not end the run.
            print(f"warning: the batch could not be kept: {error}", flush=True)
            with contextlib.suppress(OSError):
                beside.unlink()
            return None
        return path
