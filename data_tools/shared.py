"""A job that several parts work on, each perhaps on another machine.

    OUTPUT/.tokenize/lock            shared by the parts at work; a whole job has it alone, and so has the first part while it prepares
    OUTPUT/.tokenize/door.lock       parts come and go one at a time
    OUTPUT/.tokenize/assembly.lock   the part that joins the shards

A lock ends with its process, so a part that is killed leaves none behind. The last part to leave a finished job removes the
work folder: until then nothing vanishes that another one looks at, but token files that are in published shards, which only
the assembling part reads. The file system must have locks that hold between machines (Lustre: mounted with `flock`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from typing import BinaryIO

from data_tools.errors import DataError
from data_tools.files import disk_errors
from data_tools.job import Job, take_lock


class SharedJob(Job):
    """A job of which this process is one part. `with SharedJob(...) as job` holds the folder against whole jobs."""

    def is_finished(self, overwrite: bool) -> bool:
        # All parts are started with the same flags: --overwrite replaces what another job wrote, not what other parts of this one did.
        finished = (overwrite and self.is_complete()) or super().is_finished(overwrite)
        if finished and self.work.is_dir():
            self.lock = None
            self._tidy()  # the last part was killed before it could
        return finished

    def __enter__(self) -> SharedJob:
        # `prepare` takes the lock: two parts that already had it could not tell which of them is the first.
        self.lock: BinaryIO | None = None
        self.assembly: BinaryIO | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self.assembly is not None:
            self.assembly.close()
        if self.work.is_dir() and self.is_complete():
            self._tidy()
        if self.lock is not None:
            self.lock.close()

    def prepare(self, versions: dict[str, str], unit_bytes: int) -> bool:
        """The first part sets up the work folder, the others see to it that they belong to the same job. Raises DataError.

        False where other parts have finished the job in the meantime.
        """
        with self._door():
            if self.is_complete():
                return False
            self.lock = self._open("lock")
            first = take_lock(self.lock, fcntl.LOCK_EX)
            if first:
                super().prepare(versions, unit_bytes)
            if not take_lock(self.lock, fcntl.LOCK_SH):
                raise DataError(self.busy())
            if not first:
                self._agree(self.state(versions, unit_bytes))
        return True

    def begin_assembly(self) -> bool:
        """Whether it is for this part to join the shards: no other one does so or has done so."""
        self.assembly = self._open("assembly.lock")
        return take_lock(self.assembly, fcntl.LOCK_EX) and not self.is_complete()

    def finish(self) -> None:
        """Leaves the work folder to the last part."""

    def _agree(self, state: dict) -> None:
        found = self.read_state()
        if not found:
            raise DataError(f"an input has changed while other parts read it for {self.output}: start all parts again once they have ended")
        names = {"digest": "inputs, tokenizer or options", "modified": "times of the inputs", "versions": "versions of libraries"}
        different = ", ".join(names.get(key, f"--{key.replace('_', '-')}") for key in state if found.get(key) != state[key])
        if different:
            raise DataError(
                f"other parts are writing to {self.output} with other {different}: start all parts with the same command, "
                "inputs and environment, or choose another --output"
            )

    def _tidy(self) -> None:
        """Removes the work folder of a finished job where no other part is at work."""
        with self._door(), self._open("lock") as alone:
            if self.lock is not None:
                fcntl.flock(self.lock, fcntl.LOCK_UN)
            if take_lock(alone, fcntl.LOCK_EX):
                shutil.rmtree(self.work, ignore_errors=True)

    @contextlib.contextmanager
    def _door(self) -> Iterator[None]:
        while True:
            with self._open("door.lock") as door:
                take_lock(door, fcntl.LOCK_EX, wait=True)
                # The part before may have removed the work folder, and this door with it.
                if _has_its_name(door):
                    yield
                    return

    def _open(self, name: str) -> BinaryIO:
        """A file for a lock. NFS wants it open for reading where the lock is shared, for writing where it is not."""
        while True:
            with disk_errors(self.output), contextlib.suppress(FileNotFoundError):
                self.work.mkdir(parents=True, exist_ok=True)
                return open(self.work / name, "a+b")


def _has_its_name(file: BinaryIO) -> bool:
    """Whether an open file is still the one that its path leads to."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False
