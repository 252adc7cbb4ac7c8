"""Tells somebody that a run has failed, hangs, spikes or has finished, by a command of the user's: `notify.command`.

The command runs in a process apart, which outlives the run, keeps the command's output in RUN_DIR/notify.log and ends it when its time
is over. Nothing here imports more than Python itself: the file is that process's program too.
"""

import atexit
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pretrain.config import PretrainConfig

Event = Literal["failure", "stall", "spike", "finish"]
EVENTS = ("failure", "stall", "spike", "finish")
LOG_NAME = "notify.log"
"""In the run directory."""
VARIABLE = "QSPARSE_"
"""Before the names that a command finds in its environment: EVENT, RUN, RUN_DIR, STEP, MESSAGE."""
TIMEOUT_S = 60.0
MESSAGE_CHARACTERS = 2000
QUIET_S = 600.0
"""After a spike was told, in which no other one is told by this process."""
END_WAIT_S = 10.0
"""That a process which ends gives commands still at work: Slurm kills what a job step leaves behind."""

_told: dict[str, float] = {}
"""event -> time.monotonic() of the last one."""
_running: list[subprocess.Popen] = []


def tell(config: "PretrainConfig", event: Event, step: int, message: str) -> None:
    """Run the command of this configuration, where it has one. By one process for one event; returns at once, raises nothing."""
    if not config.notify.command:
        return
    if event == "spike" and event in _told and time.monotonic() - _told[event] < QUIET_S:
        return
    _told[event] = time.monotonic()
    send(config.notify.command, event, config.run_directory, step, message, config.notify.timeout_s)


def send(command: str, event: Event, run_directory: Path, step: int, message: str, timeout_s: float = TIMEOUT_S) -> None:
    """Run a shell command that finds the event in its environment; returns at once, raises nothing.

    A process that ends by itself waits up to END_WAIT_S for it; `linger` does so where a process leaves by other ways.

    run_directory: its name is QSPARSE_RUN. step: of training, in which the event happened. timeout_s: after which the command is
    killed.
    """
    directory = run_directory.absolute()
    values = {"EVENT": event, "RUN": directory.name, "RUN_DIR": str(directory), "STEP": str(step), "MESSAGE": _plain(message)}
    environment = os.environ | {VARIABLE + name: value for name, value in values.items()}
    # Isolated: neither this folder's modules nor the user's are in the way of Python's own.
    program = [sys.executable, "-I", "-S", __file__, command, str(timeout_s)]
    try:
        process = subprocess.Popen(
            program, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True, close_fds=True
        )
    except (OSError, ValueError) as error:
        _say(f"notify.command could not be started for {event}: {error}")
        return
    _running.append(process)


@atexit.register
def linger(seconds: float = END_WAIT_S) -> None:
    """Wait for commands still at work, so long at most."""
    deadline = time.monotonic() + seconds
    while _running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _running.pop().wait(max(0.0, deadline - time.monotonic()))


def _plain(message: str) -> str:
    """What an environment variable takes and a chat shows."""
    return re.sub(r"[^\n\x20-\x7e\xa0-\U0010ffff]", " ", message).strip()[:MESSAGE_CHARACTERS]


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        # One write: lines of several processes do not mix.
        sys.stderr.write(f"warning: {text}\n")
        sys.stderr.flush()


def _run(command: str, timeout_s: float) -> int:
    """The process apart: the command, its output in the log, its end. Returns its exit status; 124 where it was killed."""
    event, directory = os.environ[f"{VARIABLE}EVENT"], Path(os.environ[f"{VARIABLE}RUN_DIR"])
    message = os.environ[f"{VARIABLE}MESSAGE"].partition("\n")[0]
    with _log(directory) as log:
        _note(log, f"{event} at step {os.environ[f'{VARIABLE}STEP']}: {message}")
        outcome, status = "", 124
        try:
            process = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
            status = process.wait(timeout_s)
            outcome = f"ended with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            outcome = f"was killed after {timeout_s:g} s (notify.timeout_s)"
        except OSError as error:
            outcome = f"could not be started: {error}"
        _note(log, outcome)
    if status:
        _say(f"notify.command for {event} {outcome}; its output is in {directory / LOG_NAME}")
    return status


def _log(directory: Path):
    try:
        return (directory / LOG_NAME).open("ab", buffering=0)
    except OSError:
        # The message matters more than its log.
        return open(os.devnull, "ab", buffering=0)


def _note(log, text: str) -> None:
    with contextlib.suppress(OSError):
        log.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n".encode())


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1], float(sys.argv[2])))
