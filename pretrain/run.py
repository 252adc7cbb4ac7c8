"""One process of a run: groups, model, engine, data, callbacks, loop, and an orderly end."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.data import DataLoader

from data_tools.reader import TokenDataset
from megatron_qsparse.models.gpt import build_model
from megatron_qsparse.parallel import groups
from megatron_qsparse.parallel.zero import AdamSettings, ZeroEngine
from pretrain import notify, rollback
from pretrain.callbacks.checkpointing import FAILURE_WAIT_S, STOPPED_WAIT_S, SaveCheckpoints
from pretrain.callbacks.metrics import LogMetrics
from pretrain.callbacks.numbers import WatchNumbers
from pretrain.callbacks.ownership import KeepLease
from pretrain.callbacks.signals import StopOnSignal
from pretrain.callbacks.spikes import WatchSpikes
from pretrain.callbacks.stragglers import WatchStragglers
from pretrain.callbacks.switches import Switches
from pretrain.callbacks.validation import Validate
from pretrain.checkpoint.directory import CheckpointDirectory, remove
from pretrain.failures import report
from pretrain.going_on import Beginning, beginning
from pretrain.hardware import NoDevice, choose_device
from pretrain.lease import Lease, LeaseLost
from pretrain.progress import Progress
from pretrain.recording import start_tracking
from pretrain.resume import load, of_rank_0
from pretrain.run_directory import STOP_NAME, own
from pretrain.tracking import Tracker, settle
from pretrain.trainer import RollBack, Stopped, Trainer, TrainerState
from pretrain.validate import Validated
from pretrain.validation.spikes import reach
from pretrain.watchdog import Watchdog

COLLECTIVE_MARGIN_S = 300.0
LOOKING = "looking for a checkpoint to go on from"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Refused(RuntimeError):
    """The run cannot start, for a reason that the message tells the user."""


def run(validated: Validated, progress: Progress) -> int:
    """Train to the end, or until a signal, alone in the run directory. Returns the exit status. Raises Refused, Stopped."""
    config = validated.config
    hang = config.train.hang_timeout_s
    try:
        device = choose_device(config.device)
    except NoDevice as error:
        raise Refused(str(error)) from error
    progress.enter("meeting the other ranks")
    # The watchdog names the rank that does not come; what a collective says when its own time is over names nobody.
    timeout = timedelta(seconds=hang + COLLECTIVE_MARGIN_S) if hang else None
    groups.initialize(config.parallel, device, config.train.seed, timeout)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    progress.enter("starting")
    watchdog = Watchdog(progress, hang, functools.partial(notify.tell, config) if config.notify.command else None)
    lease = Lease(config.run_directory) if dist.get_rank() == 0 else None
    try:
        owner = _refusing(lambda: own(lease, _say, progress.renew), progress, "taking the run directory")
        _train(validated, device, lease, owner, watchdog)
    except Refused:
        raise
    except Stopped as error:
        if dist.get_rank() == 0:
            watchdog.alarm("failure", str(error), alone=True)
        raise
    except Exception as error:
        report(error, progress, watchdog.alarm)
        raise
    finally:
        if lease is not None:
            lease.release()
    watchdog.close()
    groups.destroy()
    return 0


def _refusing(action: Callable[[], Any], progress: Progress, doing: str) -> Any:
    """What it returns on rank 0, on every rank; raises Refused on all where it cannot be done. Collective."""
    try:
        return of_rank_0(action, progress, doing)
    except ValueError as error:
        raise Refused(str(error)) from error


def _train(validated: Validated, device: torch.device, lease: Lease | None, owner: str, watchdog: Watchdog) -> None:
    config, progress = validated.config, watchdog.progress
    signals = StopOnSignal(device, watchdog, Switches(config.run_directory) if lease is not None else None)
    checkpoints = CheckpointDirectory(config.run_directory / "checkpoints", config.checkpoint.keep_last, reach=reach(config), owner=owner)
    where = _refusing(lambda: _find(validated, checkpoints, progress), progress, LOOKING)
    progress.enter("building the model")
    engine = build_engine(validated, device)
    saving = SaveCheckpoints(engine, checkpoints, validated, say=lambda text: print(text, flush=True), lease=lease)
    session = Session(validated, device, engine, saving, lease, signals, progress)
    spike = session.go_on(where)
    while spike is not None:
        try:
            spike = session.go_on(session.roll_back(spike))
        except Refused as error:
            # The run has started long ago.
            raise Stopped(str(error)) from error


def _find(validated: Validated, checkpoints: CheckpointDirectory, progress: Progress) -> Beginning:
    """Where to begin. For rank 0."""
    config = validated.config
    where = beginning(config, validated.model, validated.manifest, checkpoints, _say, progress=progress.renew)
    for path in where.abandoned:
        remove(path, for_good=True)
    if where.checkpoint is None:
        rollback.forget(config.run_directory)
    if where.rolled_back:
        _say(where.rolled_back)
    return where


@dataclasses.dataclass(frozen=True)
class Session:
    """What lasts over the roll-backs of one process."""

    run: Validated
    device: torch.device
    engine: ZeroEngine
    saving: SaveCheckpoints
    lease: Lease | None
    """Rank 0's."""
    signals: StopOnSignal
    progress: Progress

    def roll_back(self, spike: RollBack) -> Beginning:
        """Decide where to; a run that goes on finds it as one that was killed would. Collective. Raises Stopped or Refused."""
        checkpoints, progress = self.saving.directory, self.progress
        progress.enter(self.saving.doing)
        self.saving.drain()

        def decide() -> str:
            if not self._is_ours():
                raise ValueError(f"{self.run.config.run_directory} was taken from this process by another: it is not rolled back")
            return rollback.decide(self.run.config, checkpoints, spike)

        _say(_refusing(decide, progress, "rolling back"))
        # What `resume` asks for is asked of a start.
        going_on = dataclasses.replace(self.run, config=dataclasses.replace(self.run.config, resume="auto"))
        return _refusing(lambda: _find(going_on, checkpoints, progress), progress, LOOKING)

    def go_on(self, where: Beginning) -> RollBack | None:
        """Train from there to the end of this process; or to a spike before which training must go back."""
        config, progress = self.run.config, self.progress
        progress.enter("loading a checkpoint")
        try:
            state = load(self.engine, where, self.saving.directory)
        except ValueError as error:
            raise Refused(str(error)) from error
        if where.checkpoint is not None:
            self.saving.catch_up(state, progress)
        if state.step >= config.train.steps:
            _say(f"{config.run_directory} is complete: {state.step} of {config.train.steps} steps are done")
            if dist.get_rank() == 0:
                progress.enter("ending", limited=False)
                settle(config.tracking, config.run_directory)
            return None
        trackers: list[Tracker] = []
        # The other ranks would wait for one that fails here, deaf to signals.
        _refusing(lambda: trackers.append(start_tracking(self.run, state, where, _say)), progress, "starting the tracking")
        tracker = trackers[0] if trackers else None
        callbacks = [
            KeepLease(self.lease), self.signals, WatchNumbers(self.run), WatchSpikes(self.run),
            WatchStragglers(config.train.straggler_factor, config.train.log_interval, self.device), Validate(self.run, self.device),
            LogMetrics(self.run, tracker, self.device), self.saving,
        ]  # fmt: skip
        trainer = Trainer(self.run, self.engine, _batches(self.run, state), state, callbacks, progress)
        try:
            trainer.fit()
        except RollBack as spike:
            self._end(tracker, "KILLED")
            return spike
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, Stopped):
                # Before anything is waited for.
                report(error, progress, self.signals.watchdog.alarm)
            self._end(tracker, "FAILED", STOPPED_WAIT_S if isinstance(error, Stopped) else FAILURE_WAIT_S)
            raise
        self._end(tracker, "FINISHED" if trainer.finished else "KILLED")
        if trainer.finished and dist.get_rank() == 0:
            notify.tell(config, "finish", state.step, f"{config.run_directory}: all {state.step} steps are done")
        if trainer.stop_reason:
            remedy = "remove it and start again" if STOP_NAME in trainer.stop_reason else "start again"
            _say(f"{trainer.stop_reason}: checkpoint saved after step {state.step}; {remedy} to go on from there")
        return None

    def _end(self, tracker: Tracker | None, status: str, save_wait_s: float = FAILURE_WAIT_S) -> None:
        """Wait for what is under way, each for its own time at most, and say how the run ended."""
        self.progress.enter("ending", limited=False)
        ours = self._is_ours()
        if status == "FAILED":
            self.saving.close(save_wait_s if ours else FAILURE_WAIT_S)
        if tracker is not None and ours:
            tracker.close(status)
        elif tracker is not None:
            tracker.abandon()

    def _is_ours(self) -> bool:
        """Whether the run directory is still this run's."""
        try:
            if self.lease is not None:
                self.lease.check(now=True)
        except LeaseLost:
            return False
        return True


def build_engine(validated: Validated, device: torch.device) -> ZeroEngine:
    """Model and optimizer of this rank; Megatron's groups must exist."""
    config = validated.config
    model = build_model(
        validated.model, config.qsparse, config.bitnet, config.parallel, sequence_length=config.data.sequence_length,
        dtype=DTYPES[config.train.precision], seed=config.train.seed, device=device, recompute=config.train.recompute,
    )  # fmt: skip
    optimizer = config.optimizer
    adam = AdamSettings(beta1=optimizer.beta1, beta2=optimizer.beta2, eps=optimizer.eps, clip=optimizer.clip)
    return ZeroEngine(
        model, stage=config.zero.stage, adam=adam,
        micro_batch_size=config.train.micro_batch_size, sequence_length=config.data.sequence_length,
        check_codes=config.train.check_codes,
    )  # fmt: skip


def _batches(validated: Validated, state: TrainerState) -> Iterator[torch.Tensor]:
    """This rank's micro-batches from the first sample that was not consumed yet."""
    config = validated.config
    dataset = TokenDataset(
        config.data.path, "train", config.data.sequence_length, config.train.seed, config.train.micro_batch_size,
        config.train.global_batch_size, data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=validated.data_parallel, consumed_samples=state.consumed_samples, window_shards=config.data.window_shards,
    )  # fmt: skip
    # A generator of its own: a loader draws a number for its workers at each start, of which the run's generators must not know.
    for batch in DataLoader(dataset, batch_size=None, num_workers=config.data.workers, generator=torch.Generator()):
        yield batch["tokens"]


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
