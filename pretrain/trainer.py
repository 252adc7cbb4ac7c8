"""The training loop. Everything optional is a callback; the loop itself only takes steps and keeps count."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pretrain.progress import Progress
from pretrain.schedules import learning_rate, weight_decay
from pretrain.validate import Validated

if TYPE_CHECKING:
    from megatron_qsparse.parallel.zero import StepResult, ZeroEngine


@dataclass(kw_only=True)
class TrainerState:
    """Where training stands: all that a checkpoint needs besides tensors. The sample order is a function of consumed_samples, which
    is the steps' number times the batch as long as no roll-back has left samples out."""

    step: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    """Steps whose gradient was not finite: their samples count as consumed, the weights did not change."""
    skipped_in_a_row: int = 0
    """Of the steps just taken."""
    recent_losses: list[float] = field(default_factory=list)
    """What a loss spike is measured by, newest last (pretrain.callbacks.spikes)."""
    high_losses: int = 0
    """Steps in a row up to now whose loss is too high."""
    rollbacks: int = 0
    """Number of the last one (pretrain.rollback)."""
    flops: float = 0.0
    """Training FLOPs spent so far."""
    activated_flops: float = 0.0
    """Those of them that do not multiply by a zero input, by the sparsity measured at logged steps."""
    measured_tokens: int = 0
    """Tokens that `activated_flops` covers."""


@dataclass
class StepReport:
    """One optimizer step, as callbacks see it."""

    step: int
    """Counted from 1: steps taken, this one included."""
    result: "StepResult"
    lr: float
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    """What callbacks before the metrics callback add to this step's log entry."""
    failure: Exception | None = None
    """Raised after this step's callbacks, on every rank alike: it is logged, but no checkpoint is written behind it."""


class Stopped(RuntimeError):
    """The run cannot go on, for a reason that the message tells the user; raised on every rank alike."""


class RollBack(RuntimeError):
    """Training must go back before a loss spike; raised on every rank alike.

    first_step: of the spike. consumed_samples: up to its end, where training goes on. rollbacks: that there were before.
    """

    def __init__(self, message: str, first_step: int, consumed_samples: int, rollbacks: int):
        super().__init__(message)
        self.first_step, self.consumed_samples, self.rollbacks = first_step, consumed_samples, rollbacks


class Callback:
    """Hooks of the loop; every rank runs them in the same order, so they may communicate."""

    doing = "between two steps"
    """What a rank does meanwhile, told where it fails or hangs there."""

    def before_step(self, trainer: "Trainer") -> None: ...

    def after_step(self, trainer: "Trainer", report: StepReport) -> None: ...


class Trainer:
    """Takes optimizer steps until the last one or until a callback calls `request_stop`.

    batches: this rank's micro-batches from `state.consumed_samples` on, int64 [micro_batch_size, sequence_length + 1].
    """

    def __init__(
        self, run: Validated, engine: "ZeroEngine", batches: Iterator[torch.Tensor], state: TrainerState, callbacks: Sequence[Callback],
        progress: Progress,
    ):  # fmt: skip
        self.run, self.config, self.engine, self.state = run, run.config, engine, state
        self.progress, self.callbacks = progress, callbacks
        self.batches = progress.reading(batches, then="computing", device=engine.device)
        self.stop_reason: str | None = None
        self.save_requested = False

    @property
    def finished(self) -> bool:
        return self.state.step >= self.config.train.steps

    @property
    def at_end(self) -> bool:
        """Whether the step just taken is the last one of this process."""
        return self.finished or self.stop_reason is not None

    def request_stop(self, reason: str) -> None:
        """Leave the loop after the present step. Must be called on every rank."""
        self.stop_reason = reason

    def request_save(self) -> None:
        """Save a checkpoint after the present step, and go on. Must be called on every rank."""
        self.save_requested = True

    def fit(self) -> None:
        while not self.finished and self.stop_reason is None:
            for callback in self.callbacks:
                callback.before_step(self)
            report = self._step()
            for callback in self.callbacks:
                self.progress.enter(callback.doing)
                callback.after_step(self, report)
            if report.failure is not None:
                raise report.failure

    def _step(self) -> StepReport:
        train, state = self.config.train, self.state
        self.progress.enter("computing", step=state.step + 1)
        started = time.perf_counter()
        lr = learning_rate(state.step, train.steps, self.config.optimizer, self.config.schedule)
        decay = weight_decay(state.step, train.steps, self.config.optimizer, self.config.schedule)
        result = self.engine.train_step(self.batches, self.run.num_micro_batches, lr, decay)
        state.step += 1
        state.consumed_samples += train.global_batch_size
        state.tokens += train.global_batch_size * self.config.data.sequence_length
        state.skipped_steps += not result.applied
        return StepReport(state.step, result, lr, time.perf_counter() - started)
