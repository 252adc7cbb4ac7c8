"""One live owner for each run directory: two processes that save and journal the same run would destroy it.

The owner has a numbered file in RUN_DIR/.owner that says who it is, with a count of heartbeats that grows every few seconds. Who
comes later waits until the count stands still, or sees at once that the owner is dead: its process is gone from this machine, or
Slurm has started its job again. It then takes the next number.

Why this is safe on shared file systems. A number is taken with link(2), which one process alone succeeds in, and no file is ever
taken over: of two that see the same dead owner one gets the next number, the other sees it. Whoever finds a higher number
than its own, or its file gone, has lost the directory and stops. Nothing depends on clocks of different machines: only changes
of the count are watched, for longer than file attributes are cached.

flufl.lock, the library for this, breaks a stale lock by removing it, with a race that its source tells of, and compares clocks.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pretrain import processes

FOLDER = ".owner"
FORMAT_VERSION = 2
"""1: with the process's start by the clock."""
INTERVAL_S = 10.0
"""Between two heartbeats."""
PATIENCE_S = 75.0
"""Without a heartbeat after which an owner counts as dead; NFS caches attributes for up to 60 s."""

LOOKS = 10
"""At a higher number whose owner may give it back."""


class DirectoryInUse(ValueError):
    """Another live process owns the run directory; the message names it."""


class LeaseLost(RuntimeError):
    """Another process has taken the run directory: this one was silent for too long."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The content of an owner's file."""

    host: str
    machine: str
    """Boot and PID namespace: where equal, `pid` and `started_ticks` tell whether the process is alive."""
    pid: int
    started_ticks: int
    """When the process started (`processes.started`)."""
    job: str
    """Slurm's job id; "" outside of Slurm."""
    restarts: int
    """How often Slurm has started this job again."""
    since: str
    """ISO 8601."""
    token: str
    beats: int = 0
    format_version: int = FORMAT_VERSION

    @classmethod
    def here(cls) -> "Owner":
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            host=socket.gethostname(), machine=processes.machine(), pid=os.getpid(), started_ticks=processes.started(os.getpid()) or 0,
            job=os.environ.get("SLURM_JOB_ID", ""), restarts=int(restarts) if restarts.isdecimal() else 0,
            since=datetime.now().astimezone().isoformat(timespec="seconds"), token=secrets.token_hex(8),
        )  # fmt: skip

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_dead(self, observer: "Owner") -> bool | None:
        """True or False where that can be known at once, from the process `observer`; None where only time tells."""
        if self.job and self.job == observer.job and self.restarts < observer.restarts:
            return True
        if self.machine != observer.machine:
            return None
        try:
            return processes.started(self.pid) != self.started_ticks
        except OSError:
            return None

    def encode(self) -> bytes:
        """Of the same length whatever the count, so that a heartbeat replaces the bytes in place."""
        return json.dumps(dataclasses.asdict(self) | {"beats": f"{self.beats:012d}"}, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> "Owner":
        """Raises ValueError for anything but `encode`'s result."""
        fields = json.loads(content)
        try:
            return cls(**fields | {"beats": int(fields["beats"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no owner of a run directory: {error}") from error


class Lease:
    """Ownership of a run directory. `acquire`, then `release`; `check` in between."""

    def __init__(self, run_directory: Path, interval_s: float = INTERVAL_S, patience_s: float = PATIENCE_S):
        self.directory, self.folder = run_directory, run_directory / FOLDER
        self.interval_s, self.patience_s = interval_s, patience_s
        self.owner = Owner.here()
        self._number = 0
        self._lost: str | None = None
        self._beaten = 0.0
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self._made_directory = False

    def acquire(self, say: Callable[[str], None] = print, waiting: Callable[[], None] = lambda: None) -> None:
        """Become the owner; waits for up to `patience_s` where another machine's process owned the directory and may be dead.

        waiting: called now and then meanwhile. Raises DirectoryInUse where a live process owns it, OSError where the directory
        cannot be written.
        """
        self._made_directory = not self.directory.exists()
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            number, other = self.newest()
            dead = other is None or other.is_dead(self.owner)
            if dead is None:
                dead = self._watch(number, other, say, waiting)
            if dead is False:
                raise DirectoryInUse(f"{self.directory} is in use by {other}: end that run, or choose another output_dir")
            if dead and other is not None:
                say(f"{self.directory} belonged to {other}, which is gone: taking it over")
            if dead and self._claim(number, other):
                break
        self._beaten = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self, now: bool = False) -> None:
        """Raises LeaseLost where the directory belongs to another process by now.

        now: by a look at the directory, else by what the last heartbeat saw. One that is long ago is not trusted: this process may
        have been stopped for so long that another has taken the directory.
        """
        if self._lost is None and (now or time.monotonic() - self._beaten > 3 * self.interval_s):
            with contextlib.suppress(OSError):
                self._look()
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def release(self) -> None:
        """Let others own the directory. Leaves nothing behind, not even the directory where it is empty and was made here."""
        self._released.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with contextlib.suppress(OSError):
            if self._number and self._lost is None:
                self._path(self._number).unlink()
            self.folder.rmdir()
            if self._made_directory:
                self.directory.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def _numbers(self) -> list[int]:
        try:
            # Not Path.glob, which says of a file system that does not answer that there is nothing.
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json") and name[:-5].isdecimal())

    def newest(self) -> tuple[int, Owner | None]:
        """The highest number taken and who took it; (0, None) where nobody has."""
        while numbers := self._numbers():
            # One that is gone by now was given back, or has a successor.
            with contextlib.suppress(FileNotFoundError):
                return numbers[-1], self._read(numbers[-1])
            time.sleep(0.01)
        return 0, None

    def _read(self, number: int) -> Owner:
        content = self._path(number).read_bytes()
        try:
            return Owner.decode(content)
        except ValueError:
            # Half written by a heartbeat, cut by a full disk, or of another version: like an owner on another machine, it is watched.
            return Owner(
                host="unknown", machine="", pid=0, started_ticks=0, job="", restarts=0, since="unknown",
                token=hashlib.sha256(content).hexdigest(),
            )  # fmt: skip

    def _watch(self, number: int, seen: Owner, say: Callable[[str], None], waiting: Callable[[], None]) -> bool | None:
        """Whether this owner of another machine is dead; None where things have changed and must be looked at again."""
        say(f"{self.directory} belongs to {seen}: looking for a sign of life for up to {self.patience_s:.0f} s")
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.interval_s))
            waiting()
            number_now, now = self.newest()
            if number_now != number:
                return None
            if now != seen:
                return False
        return True

    def _claim(self, dead_number: int, dead: Owner | None) -> bool:
        """Take the number behind the dead owner's; False where another process was faster, however long ago this one looked."""
        number = dead_number + 1
        try:
            if not self._take(number):
                return False
        except FileNotFoundError:
            # The owner that was there has ended, and its folder with it.
            return False
        if self._is_late(number, dead):
            self._path(number).unlink(missing_ok=True)
            return False
        self._number = number
        for old in self._numbers():
            if old < number:
                self._path(old).unlink(missing_ok=True)
        return True

    def _is_late(self, number: int, dead: Owner | None) -> bool:
        """Whether a number just taken lies behind another's, or behind an owner that is not the one found dead."""
        if self._numbers()[-1:] != [number]:
            return True
        try:
            return number > 1 and self._read(number - 1).token != dead.token
        except FileNotFoundError:
            # It has had a successor, who may have ended; numbers begin anew then.
            return True

    def _take(self, number: int) -> bool:
        """Make the file of a number; False where another process has it."""
        beside, content = self.folder / f".{self.owner.token}", self.owner.encode()
        try:
            _write(beside, content, "wb")
            os.link(beside, self._path(number))
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise
        except OSError:
            # A file system without hard links; those that lack them are not the ones whose exclusive creation is in doubt.
            try:
                _write(self._path(number), content, "xb")
            except FileExistsError:
                return False
        finally:
            beside.unlink(missing_ok=True)
        return True

    def _beat(self) -> None:
        while not self._released.wait(self.interval_s):
            # A file system may not answer for a while; whoever takes the directory meanwhile is found afterwards.
            with contextlib.suppress(OSError):
                self._beat_once()
            if self._lost is not None:
                return

    def _beat_once(self) -> None:
        try:
            with self._path(self._number).open("r+b") as file:
                self.owner = dataclasses.replace(self.owner, beats=self.owner.beats + 1)
                file.write(self.owner.encode())
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            pass
        self._look()
        self._beaten = time.monotonic()

    def _look(self) -> None:
        """Take note of another owner, or of being none."""
        number, other = self.newest()
        for _ in range(LOOKS):
            if number <= self._number or not self._path(self._number).exists():
                break
            # Who comes too late takes a number, sees so and gives it back; a new owner removes the old ones.
            time.sleep(min(1.0, self.interval_s))
            number, other = self.newest()
        if number != self._number:
            by = f"{other}" if number > self._number else "another"
            self._lost = f"{self.directory} was taken from this process ({self.owner}) by {by}"


def _write(path: Path, content: bytes, mode: str) -> None:
    """Durably, or not at all."""
    with path.open(mode) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
