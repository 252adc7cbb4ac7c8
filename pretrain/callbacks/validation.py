"""Loss on held-out samples: the same evenly spaced ones for every run, step and layout."""

from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from data_tools.reader import TokenStore
from pretrain.trainer import Callback, StepReport, Trainer
from pretrain.validate import Validated


class Validate(Callback):
    """Adds `val/loss` (nat per token) every `validation.interval` steps and after the last step."""

    doing = "validation"

    def __init__(self, run: Validated, device: torch.device):
        config = run.config
        self.interval, self.size, self.device = config.validation.interval, config.train.micro_batch_size, device
        self.store = TokenStore(config.data.path, "validation", config.data.sequence_length)
        # A multiple of the global batch divides among the ranks of every layout, so all layouts measure the same samples.
        batch = config.train.global_batch_size
        self.samples = max(batch, min(config.validation.samples, len(self.store)) // batch * batch)
        self.micro_batches = self.samples // (self.size * run.data_parallel)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.finished or (self.interval and report.step % self.interval == 0):
            report.metrics["val/loss"] = trainer.engine.evaluate(
                trainer.progress.reading(self._batches(), then=self.doing, device=self.device), self.micro_batches
            )

    def _batches(self) -> Iterator[torch.Tensor]:
        first = parallel_state.get_data_parallel_rank() * self.micro_batches * self.size
        for start in range(first, first + self.micro_batches * self.size, self.size):
            ids = [position * len(self.store) // self.samples for position in range(start, start + self.size)]
            yield torch.stack([torch.from_numpy(self.store[i]) for i in ids])
