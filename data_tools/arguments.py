"""What the command lines of this project have in common."""

import argparse
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
