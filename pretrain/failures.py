"""How a rank that fails says so: the one that failed by itself at once and with its traceback, those it takes with it in one line."""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

from pretrain import notify
from pretrain.progress import Progress

LOST_CONTACT = (
    "connection closed by peer", "connection reset by peer", "broken pipe", "connection refused", "connection was likely closed",
    "remote process exited", "ncclremoteerror", "socketpollconnect",
)  # fmt: skip
"""What gloo, NCCL and the store say, in lower case, where the process at the other end is gone."""
WAIT_S = 3.0
"""Of a rank that only lost contact: the one that failed speaks first. The launcher ends all as soon as one has ended."""


def report(error: BaseException, progress: Progress, alarm: Callable[[notify.Event, str, bool], None] = lambda *_: None) -> None:
    """Print it to stderr, once for each error. alarm: told of it after that (Watchdog.alarm)."""
    if getattr(error, "reported", False):
        return
    error.reported = True
    rank, doing = os.environ.get("RANK", "0"), progress.now
    cause = _lost_contact(error)
    if cause is not None:
        time.sleep(WAIT_S)
        words = str(cause).strip().splitlines()[0]
        said = f"rank {rank}: ends {doing}, it has lost contact with another rank, which says why or was killed ({words})"
        _print(said)
    else:
        lines = "".join(traceback.format_exception(error))
        said = f"rank {rank} ({socket.gethostname()}) failed {doing}"
        _print(f"{said}\n{lines}".rstrip())
        said += f": {lines.strip().splitlines()[-1]}"
    # Where the one that failed has taken the launcher's store with it, it has told so itself.
    alarm("failure", said, cause is None)


def _lost_contact(error: BaseException) -> BaseException | None:
    """The error, among those that led to this one, that only says that another process is gone."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (RuntimeError, OSError)) and any(text in str(found).lower() for text in LOST_CONTACT):
            return found
        found = found.__cause__ or found.__context__
    return None


def _print(text: str) -> None:
    # One write: lines of several ranks do not mix.
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
