"""Saves the run every `checkpoint.interval` steps, after the last step and when a signal ends it; and takes it up again."""

import dataclasses
import json
from pathlib import Path

import torch.distributed as dist

from megatron_qsparse.parallel import checkpoint
from megatron_qsparse.parallel.zero import ZeroEngine
from pretrain.checkpoints import CheckpointDirectory
from pretrain.config import dump_yaml
from pretrain.identity import NUMERICS_VERSION, differences, identity
from pretrain.trainer import Callback, StepReport, Trainer, TrainerState
from pretrain.validate import Validated

FORMAT_VERSION = 1
"""Of trainer.json."""


class SaveCheckpoints(Callback):
    def __init__(self, directory: CheckpointDirectory, run: Validated):
        self.directory, self.run, self.interval = directory, run, run.config.checkpoint.interval

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if trainer.at_end or (self.interval and report.step % self.interval == 0):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Collective: all ranks write their shards into one directory, rank 0 publishes it."""
        rank = dist.get_rank()
        partial = [self.directory.begin(trainer.state.step) if rank == 0 else None]
        dist.broadcast_object_list(partial, src=0)
        checkpoint.save(trainer.engine, partial[0] / "state")
        if rank == 0:
            content = {
                "format_version": FORMAT_VERSION,
                "numerics_version": NUMERICS_VERSION,
                "state": dataclasses.asdict(trainer.state),
                "identity": identity(self.run),
            }
            (partial[0] / "trainer.json").write_text(json.dumps(content, indent=1))
            (partial[0] / "config.yaml").write_text(dump_yaml(self.run.config))
            self.directory.publish(partial[0])
        dist.barrier()


def resume(engine: ZeroEngine, directory: CheckpointDirectory, run: Validated) -> TrainerState | None:
    """Load the newest complete checkpoint into the engine; None where there is none yet. Collective.

    Raises ValueError where it belongs to another run, naming each difference, or where every checkpoint is damaged.
    """
    found = [_find(directory, run) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], ValueError):
        raise found[0]
    if found[0] is None:
        return None
    path, state = found[0]
    checkpoint.load(engine, path / "state")
    return TrainerState(**state)


def _find(directory: CheckpointDirectory, run: Validated) -> tuple[Path, dict] | ValueError | None:
    """(path, state) of the checkpoint to go on from; the error itself where there is one, since all ranks must raise it."""
    try:
        path = directory.newest()
    except ValueError as error:
        return error
    if path is None:
        return None
    saved = json.loads((path / "trainer.json").read_text())
    if saved["format_version"] > FORMAT_VERSION:
        return ValueError(f"{path} was written by a newer version of this project (trainer.json format {saved['format_version']})")
    if found := differences(saved["identity"], json.loads(json.dumps(identity(run)))):
        lines = "\n".join(f"  {line}" for line in found)
        return ValueError(f"{path} belongs to a different run:\n{lines}\nchoose another output_dir, or restore these settings")
    if saved["numerics_version"] != NUMERICS_VERSION:
        directory.warn(
            f"{path} was trained with numerics version {saved['numerics_version']}, this is {NUMERICS_VERSION}: losses may shift here, "
            "see CHANGELOG.md"
        )
    return path, saved["state"]
