"""What the command lines of this project have in common."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path


class Parser(argparse.ArgumentParser):
    """Flags are written whole: what a part of a name stands for would change with the next flag."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)


def named_path(text: str) -> Path:
    """For an argument: an empty text, say of a shell's variable that is not set, is not the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty: name one")
    return Path(text)


def exit_status(main: Callable[[], int]) -> int:
    """Of a command line; 0 where whoever reads its output (head, less) had seen enough before it was known."""
    status = 0
    try:
        try:
            status = main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python would try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
