"""What a training process that cannot go on leaves for its job to read: torchrun turns every exit status into 1.

The job names a file in `QSPARSE_OUTCOME`; the first process that has something to say writes it.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "QSPARSE_OUTCOME"
NAME = "outcome.json"
REFUSED, STOPPED = 2, 1
"""Exit statuses of pretrain.train after which another start would end alike."""


@dataclass(frozen=True)
class Outcome:
    status: int
    message: str


def write(status: int, message: str) -> None:
    """Where a job asks for it. Never raises: the message was printed already."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    with contextlib.suppress(OSError):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        with open(name, "x") as file:
            json.dump({"status": status, "message": message}, file)


def read(path: Path) -> Outcome | None:
    """None where no process had anything to say."""
    try:
        content = json.loads(path.read_text())
        return Outcome(int(content["status"]), str(content["message"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
