"""Saves the run every `checkpoint.interval` steps, after the last step and when a signal ends it; and takes it up again."""

import dataclasses
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qsparse.parallel import checkpoint
from megatron_qsparse.parallel.checkpoint.saver import GROUP_TIMEOUT, Output, Saver, SaveReport
from megatron_qsparse.parallel.checkpoint.snapshot import layout
from megatron_qsparse.parallel.checkpoint.writing import FileRecord
from megatron_qsparse.parallel.zero import ZeroEngine
from pretrain.checkpoint.content import TrainerRecord
from pretrain.checkpoint.directory import STATE_NAME, CheckpointDirectory, Kind, step_of
from pretrain.checkpoint.files import damage
from pretrain.identity import NUMERICS_VERSION, differences, identity
from pretrain.start import source
from pretrain.tracking.shipper import RUN_ID_NAME
from pretrain.trainer import Callback, StepReport, Trainer, TrainerState
from pretrain.validate import Validated

FAILURE_WAIT_S = 600.0
"""How long a run that failed waits for the save under way: another rank may still be writing."""


class SaveCheckpoints(Callback):
    """One save at a time; where `checkpoint.asynchronous`, training goes on while it is written and published."""

    def __init__(self, engine: ZeroEngine, directory: CheckpointDirectory, run: Validated, say: Callable[[str], None] = print):
        self.engine, self.directory, self.run, self.say = engine, directory, run, say
        self.settings = run.config.checkpoint
        self.saver = Saver(engine)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Raises SaveError where the save under way has failed; checkpoints that were complete before are still there."""
        self._tell(self.saver.poll())
        kinds: list[Kind] = []
        if trainer.at_end or _is_due(report.step, self.settings.interval):
            kinds.append("step")
        if _is_due(report.step, self.settings.milestone_interval):
            kinds.append("milestone")
        if kinds:
            self._save(trainer.state, kinds)
        if trainer.at_end or not self.settings.asynchronous:
            self._tell(self.saver.wait())

    def close(self) -> None:
        """The run has failed on this rank: wait for the save under way and say what became of it."""
        if outcome := self.saver.finish(FAILURE_WAIT_S):
            self.say(f"the checkpoint under way when the run failed: {outcome}")

    def _save(self, state: TrainerState, kinds: list[Kind]) -> None:
        """Collective: all ranks copy what they write. What rank 0 writes beside it is made now, of the present state."""
        self._tell(self.saver.wait())
        run_id = self.run.config.run_directory / RUN_ID_NAME
        record = TrainerRecord(
            numerics_version=NUMERICS_VERSION, state=dataclasses.asdict(state), identity=identity(self.run), layout=layout(self.engine),
            run_id=run_id.read_text().strip() if run_id.exists() else None,
        )  # fmt: skip
        self.saver.start([self._output(state.step, kind, record) for kind in kinds])

    def _output(self, step: int, kind: Kind, record: TrainerRecord) -> Output:
        partial = self.directory.partial(step, kind)

        def publish(files: dict[str, FileRecord]) -> None:
            record.write(partial, self.run.config)
            self.directory.publish(partial, {f"{STATE_NAME}/{name}": file for name, file in files.items()})

        return Output(
            directory=partial / STATE_NAME, weights_only=kind == "milestone",
            prepare=lambda: self.directory.begin(step, kind), publish=publish,
        )  # fmt: skip

    def _tell(self, report: SaveReport | None) -> None:
        if report is not None and dist.get_rank() == 0:
            names = " and ".join(output.directory.parent.name.partition(".")[0] for output in report.outputs)
            self.say(f"saved {names}: {report.total_s:.1f} s, of which training waited {report.waited_s:.1f}")


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def resume(engine: ZeroEngine, directory: CheckpointDirectory, run: Validated) -> TrainerState | None:
    """Load the newest complete checkpoint into the engine; None where there is none yet. Collective.

    Raises ValueError where it belongs to another run, naming each difference, or where every checkpoint is damaged.
    """
    found = _of_rank_0(lambda: _newest(directory, run))
    if found is None:
        return None
    path, state = found
    if not checkpoint.load(engine, path / STATE_NAME) and dist.get_rank() == 0:
        directory.warn(
            f"{path} was written at another layout or on another kind of device: random number generators start anew "
            "(nothing of this project draws from them)"
        )
    return TrainerState(**state)


def start(engine: ZeroEngine, directory: CheckpointDirectory, run: Validated) -> Path | None:
    """Load the weights of `checkpoint.start_from` into the engine; None where that is not set. Collective.

    Raises ValueError where the checkpoint is damaged.
    """
    path = _of_rank_0(lambda: _source(directory, run))
    if path is not None:
        checkpoint.load_weights(engine, path / STATE_NAME)
    return path


def _of_rank_0(find: Callable[[], Any]) -> Any:
    """What rank 0 finds on the disk, on every rank; where it fails, all raise. Collective."""
    found = [None]
    if dist.get_rank() == 0:
        try:
            found = [find()]
        except (ValueError, OSError) as error:
            # By its words: not every exception survives being sent.
            found = [ValueError(str(error))]
        except Exception:
            # Swallowed by nobody: the other ranks wait in the broadcast below, and all of them raise it with its traceback.
            found = [RuntimeError(f"rank 0 failed while it looked for a checkpoint:\n{traceback.format_exc()}")]
    # Rank 0 reads a whole checkpoint: the default group, of NCCL on GPUs, would give up after ten minutes.
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    dist.broadcast_object_list(found, src=0, group=group)
    dist.destroy_process_group(group)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _source(directory: CheckpointDirectory, run: Validated) -> Path | None:
    path = source(run.config)
    if path is not None:
        if problem := damage(path, contents=True):
            raise ValueError(f"checkpoint.start_from: {path} is not a complete checkpoint ({problem})")
        _compare_numerics(path, TrainerRecord.read(path), directory)
    return path


def _newest(directory: CheckpointDirectory, run: Validated) -> tuple[Path, dict] | None:
    """(path, state) of the checkpoint to go on from."""
    path = directory.newest()
    if path is None:
        if milestones := directory.published("milestone"):
            last = step_of(milestones[-1])
            raise ValueError(
                f"{directory.path} holds milestones, the last of step {last}, but no checkpoint to go on from, and a run from step 0 "
                "would replace them: choose another output_dir (checkpoint.start_from takes a milestone's weights)"
            )
        return None
    saved = TrainerRecord.read(path)
    if found := differences(saved.identity, json.loads(json.dumps(identity(run)))):
        lines = "\n".join(f"  {line}" for line in found)
        raise ValueError(f"{path} belongs to a different run:\n{lines}\nchoose another output_dir, or restore these settings")
    _compare_numerics(path, saved, directory)
    return path, saved.state


def _compare_numerics(path: Path, saved: TrainerRecord, directory: CheckpointDirectory) -> None:
    if saved.numerics_version != NUMERICS_VERSION:
        directory.warn(
            f"{path} was trained with numerics version {saved.numerics_version}, this is {NUMERICS_VERSION}: losses may shift here, "
            "see CHANGELOG.md"
        )
