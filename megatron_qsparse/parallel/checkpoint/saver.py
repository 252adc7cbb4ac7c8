"""Saves in the background: training waits for a copy in host memory, a thread of each rank does the rest.

The threads have a process group of their own and need nothing from the training threads: they plan, write, and rank 0
publishes once all have written. So a save is also completed while the training threads wait for each other or have failed.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_qsparse.parallel.checkpoint.snapshot import Copier, Snapshot
from megatron_qsparse.parallel.checkpoint.writing import FileRecord, write
from megatron_qsparse.parallel.zero import ZeroEngine

GROUP_TIMEOUT = timedelta(hours=2)
"""A rank may be that much slower in writing than another; a rank that died is noticed at once."""
NICENESS = 10
"""Of the writing threads: about a tenth of a core that training wants for itself, and all of an idle one."""
LONGEST_PAUSE_S = 0.1
"""Between two looks at whether the threads of all ranks have ended, while training waits for them."""
GRACE_S = 5.0
"""Where one rank's thread has failed: how long the others may take to learn of it."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message names ranks and causes. The ones before it are untouched.

    can_retry: all ranks have learnt of it together, say of a full disk, and another save may be started. False where the threads
    have lost each other.
    """

    def __init__(self, message: str, can_retry: bool = False):
        super().__init__(message)
        self.can_retry = can_retry


@dataclass(frozen=True, kw_only=True)
class Output:
    """One directory that a save writes."""

    directory: Path
    """For the tensors; made where missing."""
    weights_only: bool = False
    prepare: Callable[[], None] = lambda: None
    """Called on rank 0 before any rank writes."""
    publish: Callable[[dict[str, FileRecord]], None] = lambda files: None
    """Called on rank 0 after all ranks have written, with what they wrote by file name."""
    discard: Callable[[], None] = lambda: None
    """Called on rank 0 where it was not written, when no rank is at it any more: to remove what there is of it."""


@dataclass
class SaveReport:
    """One finished save."""

    outputs: Sequence[Output]
    nbytes: int = 0
    """Of the tensors that this rank wrote."""
    waited_s: float = 0.0
    """How long training waited for it."""
    total_s: float = 0.0


class _Task:
    """One save and the thread that writes it."""

    def __init__(self, group: dist.ProcessGroup, snapshot: Snapshot, report: SaveReport, started: float):
        self.report = report
        # Until the thread has done everything: however it ends before that, the save has failed.
        self.error: SaveError | None = SaveError(f"{_names(report.outputs)} was not written: the writing thread ended early")
        self._group, self._snapshot, self._started = group, snapshot, started
        # A daemon: after a failure the process must be able to leave without it.
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            _be_nice()
            self._snapshot.assemble(self._group)
            for output in self.report.outputs:
                self._write(output)
            self.error = None
        except SaveError as error:
            # A thread's exception reaches nobody: `poll` raises it in the training thread, on every rank.
            self.error = error
        except BaseException as error:
            # Mostly of the threads' own communication: another rank died.
            self.error = SaveError(f"{_names(self.report.outputs)} was not written: {_text(error)}")
            self.error.__cause__ = error
        finally:
            self._snapshot = None
            self.report.total_s = time.perf_counter() - self._started

    def _write(self, output: Output) -> None:
        try:
            self._write_and_publish(output)
        except SaveError:
            if self._group.rank() == 0:
                # What cannot be removed now is in nobody's way: the next save removes it, or says that it cannot.
                with contextlib.suppress(OSError):
                    output.discard()
            raise

    def _write_and_publish(self, output: Output) -> None:
        first = self._group.rank() == 0
        self._together(output, lambda: output.prepare() if first else None)
        own = self._together(output, lambda: write(self._snapshot, output.weights_only, output.directory, self._group))
        ranks = [None] * self._group.size() if first else None
        dist.gather_object(own, ranks, group=self._group)
        files = {name: record for rank in ranks or () for name, record in rank.items()}
        self._together(output, lambda: output.publish(files) if first else None)

    def _together(self, output: Output, action: Callable[[], Any]) -> Any:
        """Do it on every rank; raise on every rank where it failed on any."""
        result = failure = None
        try:
            result = action()
        except BaseException as error:
            # Whatever it is, the other ranks wait for an answer. torch's CheckpointException is no Exception (checkpoint/api.py).
            failure = error
        causes: list[dict[int, str] | None] = [None] * self._group.size()
        dist.all_gather_object(causes, None if failure is None else _causes(failure, self._group.rank()), group=self._group)
        found = {rank: text for part in causes if part for rank, text in part.items()}
        if found:
            told = "; ".join(f"rank {rank}: {text}" for rank, text in sorted(found.items()))
            raise SaveError(f"{output.directory} was not written: {told}", can_retry=True) from failure
        return result


def _causes(failure: BaseException, rank: int) -> dict[int, str]:
    """What failed on which rank. torch tells all ranks of a failure in one exception, with every traceback in its text."""
    if isinstance(failure, CheckpointException):
        return {rank: _text(error) for rank, (error, _) in failure.failures.items()}
    return {rank: _text(failure)}


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _names(outputs: Sequence[Output]) -> str:
    return ", ".join(str(output.directory) for output in outputs)


def _be_nice() -> None:
    """Lower this thread's priority. A process that is nicer already stays so: only root may take niceness back."""
    thread = threading.get_native_id()
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


class Saver:
    """Writes checkpoints of one engine, one at a time. All ranks make the same calls in the same order."""

    def __init__(self, engine: ZeroEngine):
        self._engine = engine
        self._copier: Copier | None = None
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        self._task: _Task | None = None

    def start(self, outputs: Sequence[Output]) -> None:
        """Copy the state and write it in the background, into one directory after the other. Waits for the save before it.

        Collective. Raises SaveError for the save before it.
        """
        started = time.perf_counter()
        self.wait()
        if self._copier is None:
            self._copier = Copier(self._engine)
        snapshot = self._copier.snapshot(optimizer=not all(output.weights_only for output in outputs))
        report = SaveReport(outputs, nbytes=snapshot.nbytes, waited_s=time.perf_counter() - started)
        self._task = _Task(self._group, snapshot, report, started)

    def poll(self) -> SaveReport | None:
        """The report of a save that has ended on all ranks since the last call; None while it is under way or where there is none.

        Collective where a save was started: one all-reduce of two numbers. Raises SaveError, on all ranks, where it failed on any.
        """
        task = self._task
        if task is None:
            return None
        alive = task.thread.is_alive()
        failed = not alive and task.error is not None
        flags = torch.tensor([alive, failed], dtype=torch.int32, device=self._engine.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        anywhere_alive, anywhere_failed = flags.tolist()
        if anywhere_failed:
            self._fail()
        if anywhere_alive:
            return None
        self._task = None
        return task.report

    def wait(self) -> SaveReport | None:
        """Wait for the save under way; its report, or None where there is none. Collective and raising like `poll`."""
        task, started, pause = self._task, time.perf_counter(), LONGEST_PAUSE_S / 64
        if task is None:
            return None
        report = None
        while report is None:
            task.thread.join(pause)
            report, pause = self.poll(), min(2 * pause, LONGEST_PAUSE_S)
        report.waited_s += time.perf_counter() - started
        return report

    def finish(self, timeout_s: float) -> str | None:
        """After a failure of this rank: give the save under way this long, and say what became of it; None where there is none.

        Not collective; raises nothing.
        """
        if self._task is None:
            return None
        task, self._task = self._task, None
        task.thread.join(timeout_s)
        names = _names(task.report.outputs)
        if task.thread.is_alive():
            return f"{names} was not completed within {timeout_s:.0f} s"
        return f"{names} was completed" if task.error is None else str(task.error)

    def close(self) -> None:
        """Give the process group back. Collective."""
        dist.destroy_process_group(self._group)

    def _fail(self) -> None:
        """A thread that fails while shares are put together cannot tell the others: they would wait for it until `GROUP_TIMEOUT`."""
        task, self._task = self._task, None
        task.thread.join(GRACE_S)
        if task.thread.is_alive() or task.error is None:
            raise SaveError(f"{_names(task.report.outputs)} was not written: another rank failed and says why")
        raise SaveError(str(task.error), task.error.can_retry) from task.error


def save(engine: ZeroEngine, directory: Path, weights_only: bool = False) -> None:
    """Write the state into an existing empty directory and return when it is there. Collective. Raises SaveError."""
    saver = Saver(engine)
    try:
        saver.start([Output(directory=directory, weights_only=weights_only)])
        saver.wait()
    finally:
        saver.close()
