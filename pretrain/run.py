"""One process of a run: groups, model, engine, data, callbacks, loop, and an orderly end."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.utils.data import DataLoader

from data_tools.reader import TokenDataset
from data_tools.stats import unigram_entropy
from megatron_qsparse.models.accounting import parameters
from megatron_qsparse.models.gpt import build_model
from megatron_qsparse.parallel import groups
from megatron_qsparse.parallel.zero import AdamSettings, ZeroEngine
from pretrain import changes, rollback
from pretrain.callbacks.checkpointing import STOPPED_WAIT_S, SaveCheckpoints
from pretrain.callbacks.metrics import LogMetrics
from pretrain.callbacks.numbers import WatchNumbers
from pretrain.callbacks.ownership import KeepLease
from pretrain.callbacks.signals import StopOnSignal
from pretrain.callbacks.spikes import WatchSpikes
from pretrain.callbacks.validation import Validate
from pretrain.checkpoint.directory import CheckpointDirectory
from pretrain.config import dump_yaml, flatten, to_dict
from pretrain.failures import report
from pretrain.going_on import Beginning, beginning
from pretrain.hardware import choose_device
from pretrain.lease import Lease
from pretrain.progress import Progress
from pretrain.resume import load, of_rank_0
from pretrain.run_directory import own, writing
from pretrain.tracking import DatasetInput, Tracker, collect_environment, settle
from pretrain.tracking.record import RunRecord
from pretrain.trainer import Callback, RollBack, Stopped, Trainer, TrainerState
from pretrain.validate import Validated
from pretrain.watchdog import Watchdog

COLLECTIVE_MARGIN_S = 300.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Refused(RuntimeError):
    """The run cannot start, for a reason that the message tells the user."""


def run(validated: Validated, progress: Progress) -> int:
    """Train to the end, or until a signal, alone in the run directory. Returns the exit status. Raises Refused."""
    config = validated.config
    hang = config.train.hang_timeout_s
    try:
        device = choose_device(config.device)
        # The watchdog names the rank that does not come; what a collective says when its own time is over names nobody.
        timeout = timedelta(seconds=hang + COLLECTIVE_MARGIN_S) if hang else None
        groups.initialize(config.parallel, device, config.train.seed, timeout)
    except RuntimeError as error:
        raise Refused(str(error)) from error
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    watchdog = Watchdog(progress, hang)
    lease = Lease(config.run_directory) if dist.get_rank() == 0 else None
    try:
        _refusing(lambda: own(lease, _say))
        _train(validated, device, lease, watchdog)
    except (Refused, Stopped):
        raise
    except Exception as error:
        report(error, progress)
        raise
    finally:
        if lease is not None:
            lease.release()
    watchdog.close()
    groups.destroy()
    return 0


def _refusing(action: Callable[[], Any]) -> Any:
    """What it returns on rank 0, on every rank; raises Refused on all where it cannot be done. Collective."""
    try:
        return of_rank_0(action)
    except ValueError as error:
        raise Refused(str(error)) from error


def _train(validated: Validated, device: torch.device, lease: Lease | None, watchdog: Watchdog) -> None:
    config = validated.config
    signals = StopOnSignal(device, watchdog)
    checkpoints = CheckpointDirectory(config.run_directory / "checkpoints", config.checkpoint.keep_last)
    where = _refusing(lambda: _find(validated, checkpoints))
    engine = build_engine(validated, device)
    saving = SaveCheckpoints(engine, checkpoints, validated, say=lambda text: print(text, flush=True), lease=lease)
    while True:
        try:
            return _go_on(validated, device, engine, saving, where, [KeepLease(lease), signals], watchdog.progress)
        except RollBack as spike:
            where = _roll_back(validated, checkpoints, saving, spike)


def _find(validated: Validated, checkpoints: CheckpointDirectory) -> Beginning:
    """Where to begin, roll-backs considered. For rank 0."""
    rollback.remove_left_behind(validated, checkpoints)
    where = beginning(validated.config, validated.model, validated.manifest, checkpoints, _say)
    if where.checkpoint is None:
        rollback.forget(validated)
        return where
    return dataclasses.replace(where, state=rollback.apply(validated, where.state, _say))


def _roll_back(validated: Validated, checkpoints: CheckpointDirectory, saving: SaveCheckpoints, spike: RollBack) -> Beginning:
    """Decide where to; a run that goes on finds it as one that was killed would. Collective. Raises Stopped where it cannot be."""
    saving.drain()
    try:
        _say(of_rank_0(lambda: rollback.decide(validated, checkpoints, spike)))
    except ValueError as error:
        raise Stopped(str(error)) from error
    # What `resume` asks for is asked of a start.
    going_on = dataclasses.replace(validated, config=dataclasses.replace(validated.config, resume="auto"))
    return _refusing(lambda: _find(going_on, checkpoints))


def _go_on(
    validated: Validated, device: torch.device, engine: ZeroEngine, saving: SaveCheckpoints, where: Beginning, first: list[Callback],
    progress: Progress,
) -> None:  # fmt: skip
    """Train from there to the end of this process. Raises RollBack at a spike."""
    config, checkpoints = validated.config, saving.directory
    progress.enter("loading a checkpoint")
    try:
        state = load(engine, where, checkpoints)
    except ValueError as error:
        raise Refused(str(error)) from error
    if where.checkpoint is not None:
        saving.catch_up(state)
    if state.step >= config.train.steps:
        _say(f"{config.run_directory} is complete: {state.step} of {config.train.steps} steps are done")
        if dist.get_rank() == 0:
            settle(config.tracking, config.run_directory)
        return
    trackers: list[Tracker] = []
    # The other ranks would wait for one that fails here, deaf to signals.
    _refusing(lambda: trackers.append(_start_tracking(validated, state, where)))
    tracker = trackers[0] if trackers else None
    callbacks = [
        *first, WatchNumbers(validated), WatchSpikes(validated), Validate(validated, device), LogMetrics(validated, tracker, device),
        saving,
    ]  # fmt: skip
    trainer = Trainer(validated, engine, _batches(validated, state, device), state, callbacks, progress)
    status = "FAILED"
    try:
        trainer.fit()
        status = "FINISHED" if trainer.finished else "KILLED"
        progress.enter("ending")
    except RollBack:
        status = "KILLED"
        raise
    except Stopped:
        saving.close(STOPPED_WAIT_S)
        raise
    except Exception as error:
        # Before anything is waited for.
        report(error, progress)
        raise
    finally:
        if status == "FAILED":
            saving.close()
        if tracker is not None:
            tracker.close(status)
    if trainer.stop_reason:
        _say(f"{trainer.stop_reason}: checkpoint saved after step {state.step}; start again to go on from there")


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


def _batches(validated: Validated, state: TrainerState, device: torch.device) -> Iterator[torch.Tensor]:
    """This rank's micro-batches from the first sample that was not consumed yet."""
    config = validated.config
    dataset = TokenDataset(
        config.data.path, "train", config.data.sequence_length, config.train.seed, config.train.micro_batch_size,
        config.train.global_batch_size, data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=validated.data_parallel, consumed_samples=state.consumed_samples, window_shards=config.data.window_shards,
    )  # fmt: skip
    # A generator of its own: a loader draws a number for its workers at each start, of which the run's generators must not know.
    for batch in DataLoader(dataset, batch_size=None, num_workers=config.data.workers, generator=torch.Generator()):
        yield batch["tokens"].to(device)


def _start_tracking(validated: Validated, state: TrainerState, where: Beginning) -> Tracker:
    config, manifest = validated.config, validated.manifest
    directory = config.run_directory
    data = DatasetInput(name=config.data.path, digest=manifest.digest, source=config.data.path, context="training")
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        resumed_from_step = state.step if where.checkpoint else 0 if _was_begun(validated) else None
        (directory / "config.yaml").write_text(dump_yaml(config))
        tracker = Tracker(
            config.tracking, directory, params=flatten(to_dict(config)) | {"world_size": dist.get_world_size()},
            tags=collect_environment() | ({"started_from": str(where.weights)} if where.weights else {}),
            datasets=[data], artifacts=[directory / "config.yaml"], resumed_from_step=resumed_from_step,
        )  # fmt: skip
    count = parameters(validated.model, subln=config.bitnet.subln)
    _say(
        f"{directory}: {count.total:,} parameters ({count.linear:,} in the layers' linears), {dist.get_world_size()} processes, "
        f"{validated.data_parallel} data-parallel, {validated.num_micro_batches} micro-batches of {config.train.micro_batch_size} "
        f"samples each, {config.train.global_batch_size * config.data.sequence_length:,} tokens a step"
    )
    if where.weights:
        _say(f"starting with the weights of {where.weights}")
    if where.checkpoint:
        _say(f"going on after step {state.step}, {state.consumed_samples:,} samples")
    if tracker.is_new_run:
        tracker.log(
            {"model/parameters": count.total, "data/validation_unigram_entropy": unigram_entropy(config.data.path, "validation")}, step=0
        )
    return tracker


def _was_begun(validated: Validated) -> bool:
    """Whether the run directory holds this very run, killed before its first checkpoint: starting over, it stays one run in MLflow."""
    directory = validated.config.run_directory
    try:
        record = RunRecord.load(directory)
        same = changes.none(directory / "config.yaml", validated.config)
    except (OSError, ValueError):
        return False
    return same and record.status != "FINISHED" and any(data.digest == validated.manifest.digest for data in record.datasets)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
