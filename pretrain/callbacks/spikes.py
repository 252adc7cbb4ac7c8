"""Loss spikes: found by robust statistics of the recent losses, told, and where asked for the reason to go back.

PaLM (arXiv 2204.02311, section 5.1) met about 20 of them and went on from a checkpoint about 100 steps before each, leaving out
200 to 500 batches that had been seen before and during it; that the same batches did no harm from another state showed them to
be a matter of both. Others judge a loss by the mean of a window: OLMo-core's SkipStepOptimizer by 128 steps and 6 standard
deviations, llm-foundry's KillLossSpike by 100 steps, twice the mean and 4 steps of patience. Median and median absolute deviation
are used here because one outlier in the window moves a mean and a standard deviation, but not these.
"""

import math
import statistics

import torch.distributed as dist

from pretrain import notify
from pretrain.callbacks.batches import BatchFolder
from pretrain.config import SpikeConfig
from pretrain.trainer import Callback, RollBack, StepReport, Stopped, Trainer, TrainerState
from pretrain.validate import Validated

FOLDER = "spikes"
NORMAL = 1.4826
"""A normal distribution's standard deviation, in median absolute deviations."""


class WatchSpikes(Callback):
    """Every rank decides alike: the loss is the global one, and all that the decision rests on is in the trainer's state."""

    doing = "looking for loss spikes"

    def __init__(self, run: Validated):
        self.run, self.settings = run, run.config.spike
        self.batches = BatchFolder(run, FOLDER)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Sets `report.failure` to Stopped or RollBack at the step that makes a spike of the last ones."""
        state, settings = trainer.state, self.settings
        if settings.action == "off":
            return
        bound = observe(state, report.result.loss, settings)
        if bound is None:
            return
        report.metrics["train/spike"] = state.high_losses
        if dist.get_rank() == 0:
            self.batches.keep(report, state.consumed_samples - self.run.config.train.global_batch_size)
        if state.high_losses != settings.patience:
            return
        first = report.step - settings.patience + 1
        told = f"loss spike in steps {first} to {report.step}: loss {report.result.loss:.4f}, above {bound:.4f}"
        if dist.get_rank() == 0:
            print(f"warning: {told}; batches are in {self.batches.path}", flush=True)
            if settings.action != "stop":
                # Which is told as a failure.
                notify.tell(self.run.config, "spike", report.step, f"{told} (spike.action={settings.action})")
        if settings.action == "stop":
            report.failure = Stopped(
                f"{told}, and spike.action=stop: look at the batches in {self.batches.path}; lower optimizer.lr, or set "
                "spike.action to warn or rollback, and start again with --allow_change optimizer.lr,spike"
            )
        elif settings.action == "rollback":
            report.failure = RollBack(told, first, state.consumed_samples, state.rollbacks)


def observe(state: TrainerState, loss: float, settings: SpikeConfig) -> float | None:
    """Take note of a step's loss; the bound where it lies above it, else None.

    A loss above the bound stays out of the window, so that a spike is no part of what it is measured by; one that has been told and
    stays high enters it, so that it becomes what is usual.
    """
    if not math.isfinite(loss):
        return None
    window = state.recent_losses
    bound = None
    if len(window) >= settings.window:
        median = statistics.median(window)
        deviation = NORMAL * statistics.median(abs(value - median) for value in window)
        limit = median + max(settings.threshold * deviation, settings.min_increase)
        bound = limit if loss > limit else None
    state.high_losses = 0 if bound is None else state.high_losses + 1
    if bound is None or state.high_losses > settings.patience:
        window.append(loss)
    del window[: -settings.window]
    return bound
