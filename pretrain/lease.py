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

FOLDER = ".owner"
FORMAT_VERSION = 1
INTERVAL_S = 10.0
"""Between two heartbeats."""
PATIENCE_S = 75.0
"""Without a heartbeat after which an owner counts as dead; NFS caches attributes for up to 60 s."""


class DirectoryInUse(ValueError):
    """Another live process owns the run directory; the message names it."""


class LeaseLost(RuntimeError):
    """Another process has taken the run directory: this one was silent for too long."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The content of an owner's file."""

    host: str
    machine: str
    """Boot and PID namespace: where equal, `pid` and `started` tell whether the process is alive."""
    pid: int
    started: float
    """When the process started, seconds since the epoch of that machine."""
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
        import psutil

        return cls(
            host=socket.gethostname(), machine=_machine(), pid=os.getpid(), started=psutil.Process().create_time(),
            job=os.environ.get("SLURM_JOB_ID", ""), restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
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
        import psutil

        try:
            process = psutil.Process(self.pid)
            # One that nobody has waited for, as in containers without an init, does nothing any more.
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
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
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self._made_directory = False

    def acquire(self, say: Callable[[str], None] = print) -> None:
        """Become the owner; waits for up to `patience_s` where another machine's process owned the directory and may be dead.

        Raises DirectoryInUse where a live process owns it, OSError where the directory cannot be written.
        """
        self._made_directory = not self.directory.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            number, other = self.newest()
            dead = other is None or other.is_dead(self.owner)
            if dead is None:
                dead = self._watch(number, other, say)
            if dead is False:
                raise DirectoryInUse(f"{self.directory} is in use by {other}: end that run, or choose another output_dir")
            if dead and other is not None:
                say(f"{self.directory} belonged to {other}, which is gone: taking it over")
            if dead and self._claim(number + 1):
                break
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LeaseLost where the directory belongs to another process by now."""
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
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit())

    def newest(self) -> tuple[int, Owner | None]:
        """The highest number taken and who took it; (0, None) where nobody has, (n, None) where the file cannot be understood."""
        numbers = self._numbers()
        if not numbers:
            return 0, None
        try:
            return numbers[-1], Owner.decode(self._path(numbers[-1]).read_bytes())
        except FileNotFoundError:
            return 0, None
        except ValueError:
            # Half written by a heartbeat, or cut by a full disk: like an owner on another machine, it is watched.
            return numbers[-1], Owner(host="unknown", machine="", pid=0, started=0.0, job="", restarts=0, since="unknown", token="")

    def _watch(self, number: int, seen: Owner, say: Callable[[str], None]) -> bool | None:
        """Whether this owner of another machine is dead; None where things have changed and must be looked at again."""
        say(f"{self.directory} belongs to {seen}: looking for a sign of life for up to {self.patience_s:.0f} s")
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.interval_s))
            number_now, now = self.newest()
            if number_now != number:
                return None
            if now != seen:
                return False
        return True

    def _claim(self, number: int) -> bool:
        """Take a number; False where another process has it."""
        beside = self.folder / f".{self.owner.token}"
        with beside.open("wb") as file:
            file.write(self.owner.encode())
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, self._path(number))
        except FileExistsError:
            return False
        except OSError:
            # A file system without hard links; those that lack them are not the ones whose exclusive creation is in doubt.
            try:
                with self._path(number).open("xb") as file:
                    file.write(self.owner.encode())
            except FileExistsError:
                return False
        finally:
            beside.unlink()
        self._number = number
        for old in self._numbers():
            if old < number:
                self._path(old).unlink(missing_ok=True)
        return True

    def _beat(self) -> None:
        while not self._released.wait(self.interval_s):
            try:
                self._beat_once()
            except FileNotFoundError:
                self._lost = f"{self.directory} was taken from this process ({self.owner}) by another"
            except OSError:
                # A file system that does not answer for a while; whoever takes the directory meanwhile is found afterwards.
                continue
            if self._lost is not None:
                return

    def _beat_once(self) -> None:
        with self._path(self._number).open("r+b") as file:
            self.owner = dataclasses.replace(self.owner, beats=self.owner.beats + 1)
            file.write(self.owner.encode())
            file.flush()
            os.fsync(file.fileno())
        numbers = self._numbers()
        if numbers and numbers[-1] > self._number:
            _, other = self.newest()
            self._lost = f"{self.directory} was taken from this process ({self.owner}) by {other}"


def _machine() -> str:
    """Equal for processes that see each other's PIDs."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(8)}"
