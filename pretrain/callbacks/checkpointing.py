"""Saves the run every `checkpoint.interval` steps, after the last step and when a signal ends it."""

import dataclasses
from collections.abc import Callable

import torch.distributed as dist

from megatron_qsparse.parallel.checkpoint.saver import Output, Saver, SaveReport
from megatron_qsparse.parallel.checkpoint.snapshot import layout
from megatron_qsparse.parallel.checkpoint.writing import FileRecord
from megatron_qsparse.parallel.zero import ZeroEngine
from pretrain.checkpoint.content import TrainerRecord
from pretrain.checkpoint.directory import STATE_NAME, CheckpointDirectory, Kind
from pretrain.identity import NUMERICS_VERSION, identity
from pretrain.lease import Lease
from pretrain.tracking.shipper import RUN_ID_NAME
from pretrain.trainer import Callback, StepReport, Trainer, TrainerState
from pretrain.validate import Validated

FAILURE_WAIT_S = 600.0
"""How long a run that failed waits for the save under way: another rank may still be writing."""


class SaveCheckpoints(Callback):
    """One save at a time; where `checkpoint.asynchronous`, training goes on while it is written and published."""

    def __init__(
        self, engine: ZeroEngine, directory: CheckpointDirectory, run: Validated, say: Callable[[str], None] = print,
        lease: Lease | None = None,
    ):  # fmt: skip
        """lease: rank 0's, without which nothing is published."""
        self.engine, self.directory, self.run, self.say, self.lease = engine, directory, run, say, lease
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
            if self.lease is not None:
                self.lease.check()
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
