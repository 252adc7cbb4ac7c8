"""Saves the run every `checkpoint.interval` steps, after the last step and when a signal ends it."""

import dataclasses
import json

import torch.distributed as dist

from megatron_qsparse.parallel import checkpoint
from megatron_qsparse.parallel.zero import ZeroEngine
from pretrain.checkpoints import CheckpointDirectory
from pretrain.config import dump_yaml
from pretrain.trainer import Callback, StepReport, Trainer, TrainerState
from pretrain.validate import Validated


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
        checkpoint.save(trainer.engine, partial[0] / "state", {"step": trainer.state.step})
        if rank == 0:
            trainer_json = {
                "state": dataclasses.asdict(trainer.state),
                "identity": identity(self.run),
                "data_parallel": self.run.data_parallel,
            }
            (partial[0] / "trainer.json").write_text(json.dumps(trainer_json, indent=1))
            (partial[0] / "config.yaml").write_text(dump_yaml(self.run.config))
            self.directory.publish(partial[0])
        dist.barrier()


def identity(run: Validated) -> dict:
    """What makes a run this run: a checkpoint with another identity belongs to another one."""
    config = run.config
    return {
        "model": dataclasses.asdict(run.model) | {"preset": None},
        "qsparse": dataclasses.asdict(config.qsparse),
        "bitnet": dataclasses.asdict(config.bitnet),
        "train.seed": config.train.seed,
        "train.global_batch_size": config.train.global_batch_size,
        "train.precision": config.train.precision,
        "data.sequence_length": config.data.sequence_length,
        "data.window_shards": config.data.window_shards,
        "data manifest": run.manifest.digest,
    }


def resume(engine: ZeroEngine, directory: CheckpointDirectory, run: Validated) -> TrainerState | None:
    """Load the newest complete checkpoint into the engine; None where there is none. Collective.

    Raises ValueError, naming each difference, where it belongs to a run with another identity.
    """
    found = [directory.newest() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    if found[0] is None:
        return None
    saved = json.loads((found[0] / "trainer.json").read_text())
    here = json.loads(json.dumps(identity(run)))
    different = [
        f"  {name}: {saved['identity'].get(name)} in the checkpoint, {here[name]} now"
        for name in here
        if saved["identity"].get(name) != here[name]
    ]
    if different:
        raise ValueError(
            f"{found[0]} belongs to a different run:\n" + "\n".join(different) + "\nchoose another output_dir, or restore these settings"
        )
    checkpoint.load(engine, found[0] / "state")
    return TrainerState(**saved["state"])
