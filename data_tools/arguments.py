"""What the command lines of this project have in common."""

import argparse
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO


class Parser(argparse.ArgumentParser):
    """Flags are written whole: what a part of a name stands for would change with the next flag."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)


def named_path(text: str) -> Path:
    """For an argument: an empty text, say of a shell's variable that is not set, is not the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty: name one")
    return Path(text)


def exit_status(main: Callable[[], int]) -> int | str | None:
    """Of a command line, for `sys.exit`, without a word where whoever reads its output (head, less) has seen enough.

    141, as of other programs that SIGPIPE ends, where that came before `main` knew its own: it may have left something undone.
    """
    try:
        status = main()
    except SystemExit as error:
        status = error.code
    except BrokenPipeError:
        if not any(_is_unread(stream) for stream in (sys.stdout, sys.stderr)):
            raise
        status = 128 + signal.SIGPIPE
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            # Python would try again at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def _is_unread(stream: TextIO | None) -> bool:
    if stream is None:
        return False
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
