"""Training runs whose processes are forked from one that has imported the libraries, which costs 8 s a process otherwise.

They run `pretrain.train.main` as under torchrun, on processes of their own: one that fails takes the others with it. What is about
the launcher itself (its signals, its exit status, its order of output) is tested under the real one, see `launch.started`.
"""

import atexit
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import IO

from tests.distributed import forking

GRACE_S = 30.0
"""After SIGTERM, as torchrun's."""


class ForkedRun:
    """One run, with the names of subprocess.Popen; stderr is part of the output.

    args: of pretrain.train. before: called in each process with its rank before anything else, a picklable function of a module's
    top level. Leaving the context kills whatever is left.
    """

    def __init__(self, args: list[str], processes: int, before: Callable[[int], None] | None = None):
        self._file = tempfile.NamedTemporaryFile(prefix="output", suffix=".log")
        environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        context = forking()
        self.processes = [
            context.Process(target=_train, args=(rank, args, environment, self._file.name, before), name=f"rank {rank}")
            for rank in range(processes)
        ]
        for process in self.processes:
            process.start()
        self.together = False
        """Whether all die with the first that does, as on a machine that loses power; else the others are asked to end."""
        self._told: float | None = None
        self.returncode: int | None = None

    def __enter__(self) -> "ForkedRun":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._file.close()

    @property
    def stdout(self) -> IO[str]:
        return io.StringIO(self.output)

    @property
    def output(self) -> str:
        """So far."""
        with open(self._file.name, errors="replace") as file:
            return file.read()

    def poll(self) -> int | None:
        """The exit status where all have ended: 0, or that of the first that failed."""
        codes = [process.exitcode for process in self.processes]
        failed = next((code for code in codes if code), None)
        if failed is not None and self.returncode is None:
            self.returncode = failed
        if None not in codes:
            self.returncode = self.returncode or 0
            return self.returncode
        if failed is not None:
            self._end_others()
        return None

    def _end_others(self) -> None:
        if self._told is None:
            self._told = time.monotonic()
            self.send_signal(signal.SIGKILL if self.together else signal.SIGTERM)
        elif time.monotonic() - self._told > GRACE_S:
            self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("pretrain.train", timeout, self.output)
            wait([process.sentinel for process in self.processes if process.exitcode is None], timeout=0.2)
        return self.output, None

    def send_signal(self, number: signal.Signals) -> None:
        """To all that live."""
        for process in self.processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)


def _train(rank: int, args: list[str], environment: dict[str, str], output: str, before: Callable[[int], None] | None) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    if before is not None:
        before(rank)
    from pretrain.train import main

    try:
        sys.exit(main(args))
    finally:
        # A child of the server ends without them.
        atexit._run_exitfuncs()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
