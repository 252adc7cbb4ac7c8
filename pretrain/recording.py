"""What MLflow and the journal are told of a run when a process begins to train it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_tools.stats import unigram_entropy
from megatron_qsparse.models.accounting import parameters
from pretrain import changes, rollback
from pretrain.config import dump_yaml, flatten, to_dict
from pretrain.going_on import Beginning
from pretrain.run_directory import writing
from pretrain.tracking import DatasetInput, Tracker, collect_environment
from pretrain.tracking.record import RunRecord, write_atomically
from pretrain.trainer import TrainerState
from pretrain.validate import Validated
from pretrain.validation import spikes


def start_tracking(validated: Validated, state: TrainerState, where: Beginning, say: Callable[[str], None]) -> Tracker:
    """Begin the run's record or take it up again, and say what this process trains. For rank 0.

    Raises ValueError where the run directory cannot be written, or holds a damaged record.
    """
    config, manifest = validated.config, validated.manifest
    directory = config.run_directory
    data = DatasetInput(name=config.data.path, digest=manifest.digest, source=config.data.path, context="training")
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        resumed_from_step = state.step if where.checkpoint else 0 if _was_begun(validated) else None
        write_atomically(directory / "config.yaml", dump_yaml(config).encode())
        tracker = Tracker(
            config.tracking, directory, params=flatten(to_dict(config)) | {"world_size": dist.get_world_size()},
            tags=_tags(directory, where),
            datasets=[data], artifacts=[directory / "config.yaml"], resumed_from_step=resumed_from_step,
        )  # fmt: skip
    count = parameters(validated.model, subln=config.bitnet.subln)
    say(
        f"{directory}: {count.total:,} parameters ({count.linear:,} in the layers' linears), {dist.get_world_size()} processes, "
        f"{validated.data_parallel} data-parallel, {validated.num_micro_batches} micro-batches of {config.train.micro_batch_size} "
        f"samples each, {config.train.global_batch_size * config.data.sequence_length:,} tokens a step"
    )
    for warning in spikes.warnings(config):
        say(f"warning: {warning}")
    if where.weights:
        say(f"starting with the weights of {where.weights}")
    if where.checkpoint:
        say(f"going on after step {state.step}, {state.consumed_samples:,} samples")
    if tracker.is_new_run:
        tracker.log(
            {"model/parameters": count.total, "data/validation_unigram_entropy": unigram_entropy(config.data.path, "validation")}, step=0
        )
    return tracker


def _tags(directory: Path, where: Beginning) -> dict[str, Any]:
    tags = collect_environment() | ({"started_from": str(where.weights)} if where.weights else {})
    for entry in rollback.read(directory):
        tags[f"rollback.{entry.number}"] = (
            f"before the spike from step {entry.spike_begins} to step {entry.checkpoint_step}, and on with sample {entry.consumed_samples}"
        )
    return tags


def _was_begun(validated: Validated) -> bool:
    """Whether the run directory holds this very run, killed before its first checkpoint: starting over, it stays one run in MLflow."""
    directory = validated.config.run_directory
    try:
        record = RunRecord.load(directory)
        same = changes.none(directory / "config.yaml", validated.config)
    except (OSError, ValueError):
        return False
    return same and record.status != "FINISHED" and any(data.digest == validated.manifest.digest for data in record.datasets)
