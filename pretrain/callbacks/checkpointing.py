"""Saves the run every `checkpoint.interval` steps, after the last step and when a signal ends it."""

import dataclasses
import shutil
from collections.abc import Callable

import torch.distributed as dist

from megatron_qsparse.parallel.checkpoint.saver import Output, SaveError, Saver, SaveReport
from megatron_qsparse.parallel.checkpoint.snapshot import layout
from megatron_qsparse.parallel.checkpoint.writing import FileRecord
from megatron_qsparse.parallel.zero import ZeroEngine
from pretrain.checkpoint.content import TrainerRecord
from pretrain.checkpoint.directory import KINDS, STATE_NAME, CheckpointDirectory, Kind, step_of
from pretrain.identity import NUMERICS_VERSION, identity
from pretrain.lease import Lease
from pretrain.progress import Progress
from pretrain.resume import of_rank_0
from pretrain.tracking.shipper import RUN_ID_NAME
from pretrain.trainer import Callback, StepReport, Stopped, Trainer, TrainerState
from pretrain.validate import Validated

FAILURE_WAIT_S = 30.0
"""How long a rank that failed alone waits for the save under way, which may still be completed: the others wait for this rank
meanwhile, and all are to have ended within a minute."""
STOPPED_WAIT_S = 600.0
"""The same where all ranks stop alike."""


class SaveCheckpoints(Callback):
    """One save at a time; where `checkpoint.asynchronous`, training goes on while it is written and published.

    A checkpoint that is due after a step without finite numbers is written after the next step that has them: weights that make
    nothing but NaN must not take the places of good ones. So is one that is due while it is not yet clear whether a loss spike begins.
    """

    doing = "saving a checkpoint"

    def __init__(
        self, engine: ZeroEngine, directory: CheckpointDirectory, run: Validated, say: Callable[[str], None] = print,
        lease: Lease | None = None,
    ):  # fmt: skip
        """lease: rank 0's, without which nothing is published."""
        self.engine, self.directory, self.run, self.say, self.lease = engine, directory, run, say, lease
        self.settings = run.config.checkpoint
        self.saver = Saver(engine)
        self.failures = 0
        """In a row."""
        self.owed: set[Kind] = set()
        """Kinds that were due after a step of which it is not clear whether its weights are any good."""

    def catch_up(self, state: TrainerState, progress: Progress) -> None:
        """Write the milestone of the step that a run goes on from, where it was killed between the two. Collective."""
        if not _is_due(state.step, self.settings.milestone_interval):
            return
        missing = of_rank_0(
            lambda: all(step_of(path) != state.step for path in self.directory.complete("milestone")), progress, "looking at milestones"
        )
        if missing:
            progress.enter(self.doing)
            self._save(state, ["milestone"])
            self._ended(self.saver.wait)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Raises Stopped where too many saves have failed in a row, or the last one; checkpoints that were complete are still there."""
        self._ended(self.saver.poll)
        kinds = self._due(trainer, report)
        if kinds:
            self._ended(self.saver.wait)
            self._refuse_spoilt()
            self._save(trainer.state, kinds)
        if trainer.at_end:
            if not self._ended(self.saver.wait):
                self._save(trainer.state, kinds)
                if not self._ended(self.saver.wait):
                    raise Stopped(f"the last checkpoint could not be written: {self._left()}")
        elif not self.settings.asynchronous:
            self._ended(self.saver.wait)

    def _due(self, trainer: Trainer, report: StepReport) -> list[Kind]:
        """What to save after this step."""
        intervals = {"step": self.settings.interval, "milestone": self.settings.milestone_interval}
        self.owed |= {kind for kind, interval in intervals.items() if _is_due(report.step, interval)}
        if report.failure is not None:
            return []
        if trainer.at_end or trainer.save_requested:
            self.owed.add("step")
            trainer.save_requested = False
        unclear = trainer.state.skipped_in_a_row or 0 < trainer.state.high_losses < self.run.config.spike.patience
        if unclear and not trainer.at_end:
            return []
        due: list[Kind] = [kind for kind in KINDS if kind in self.owed]
        self.owed.clear()
        return due

    def _refuse_spoilt(self) -> None:
        """Collective. Raises Stopped where a weight of any rank is not finite, which the loss tells one step later at the earliest."""
        if not self.engine.weights_are_finite():
            raise Stopped(
                f"a weight is not finite, though no gradient was: no checkpoint is written of it ({self._left()}). Is the learning rate "
                "far too high, or the memory of a machine faulty?"
            )

    def drain(self) -> None:
        """Wait for the save under way, before going back to an earlier one. Collective."""
        self._ended(self.saver.wait)
        self.owed.clear()

    def _ended(self, look: Callable[[], SaveReport | None]) -> bool:
        """Say what became of a save that `look` finds ended; False where it failed. Raises Stopped at the last failure allowed."""
        try:
            report = look()
        except SaveError as error:
            if not error.can_retry:
                raise
            self._missed(error)
            return False
        if report is not None:
            self.failures = 0
            names = " and ".join(output.directory.parent.name.partition(".")[0] for output in report.outputs)
            self._tell(f"saved {names}: {report.total_s:.1f} s, of which training waited {report.waited_s:.1f}")
        return True

    def _missed(self, error: SaveError) -> None:
        self.failures += 1
        allowed = self.settings.max_failures
        self._tell(f"warning: {error} ({self.failures} of {allowed} failures in a row; {self._left()})")
        if self.failures >= allowed:
            raise Stopped(f"{self.failures} checkpoints in a row could not be written, the last one because: {error}; {self._left()}")

    def _left(self) -> str:
        published = self.directory.published()
        return f"the last complete one is {published[-1]}" if published else "there is no complete one yet"

    def _tell(self, text: str) -> None:
        if dist.get_rank() == 0:
            self.say(text)

    def close(self, timeout_s: float = FAILURE_WAIT_S) -> None:
        """The run has failed on this rank: wait for the save under way and say what became of it."""
        if outcome := self.saver.finish(timeout_s):
            self.say(f"the checkpoint under way when the run failed: {outcome}")

    def _save(self, state: TrainerState, kinds: list[Kind]) -> None:
        """Collective: all ranks copy what they write. What rank 0 writes beside it is made now, of the present state."""
        run_id = self.run.config.run_directory / RUN_ID_NAME
        record = TrainerRecord(
            numerics_version=NUMERICS_VERSION, state=dataclasses.asdict(state), identity=identity(self.run), layout=layout(self.engine),
            run_id=run_id.read_text().strip() if run_id.exists() else None,
        )  # fmt: skip
        self.saver.start([self._output(state.step, kind, record) for kind in kinds])

    def _output(self, step: int, kind: Kind, record: TrainerRecord) -> Output:
        partial = self.directory.partial(step, kind)

        def prepare() -> None:
            self._check_lease()
            self.directory.begin(step, kind)

        def publish(files: dict[str, FileRecord]) -> None:
            self._check_lease()
            record.write(partial, self.run.config)
            self.directory.publish(partial, {f"{STATE_NAME}/{name}": file for name, file in files.items()})

        return Output(
            directory=partial / STATE_NAME, weights_only=kind == "milestone",
            prepare=prepare, publish=publish, discard=lambda: shutil.rmtree(partial),
        )  # fmt: skip

    def _check_lease(self) -> None:
        """Raises LeaseLost where the checkpoints are another process's by now."""
        if self.lease is not None:
            self.lease.check(now=True)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
