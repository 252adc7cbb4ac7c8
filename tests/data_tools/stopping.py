"""Tokenizations that stop by themselves in the middle: a job is over sooner than a test that shares its cores may look at it.

`python -m tests.data_tools.stopping FOLDER PATTERN COUNT ARGUMENT...` is `python -m data_tools ARGUMENT...`, which sends itself
SIGSTOP once FOLDER holds COUNT files of PATTERN: before it publishes another file, or counts another unit as done, which is what is
left to it where it has worker processes.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from data_tools.progress import Progress
from tests.data_tools.helpers import ENVIRONMENT


def stopped(folder: Path, pattern: str, count: int, *arguments: object) -> subprocess.Popen:
    """A job that stands still there, with all its locks. Workers of its own go on with the few units that they have been given."""
    command = [sys.executable, "-m", "tests.data_tools.stopping", *map(str, (folder, pattern, count, *arguments))]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert state.si_code == os.CLD_STOPPED, process.communicate()
    return process


def _stop_before(function: Callable, there: Callable[[], bool], stops: list[signal.Signals]) -> Callable:
    def wrapped(*arguments: object) -> object:
        if stops and there():
            os.kill(os.getpid(), stops.pop())
        return function(*arguments)

    return wrapped


if __name__ == "__main__":
    folder, pattern, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    del sys.argv[1:4]
    once = [signal.SIGSTOP]
    for owner, name in ((os, "replace"), (Progress, "update")):
        setattr(owner, name, _stop_before(getattr(owner, name), lambda: len(list(folder.glob(pattern))) >= count, once))
    runpy.run_module("data_tools", run_name="__main__", alter_sys=True)
