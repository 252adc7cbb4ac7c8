"""A notify.command that writes down what it was told, and how it is read."""

import time
from pathlib import Path

from pretrain import notify

NOTIFY = [
    "--notify.command",
    'echo "$QSPARSE_EVENT|$QSPARSE_RUN|$QSPARSE_RUN_DIR|$QSPARSE_STEP|$QSPARSE_MESSAGE" >> "$QSPARSE_RUN_DIR/told"',
]


def told(run: Path) -> list[list[str]]:
    """[event, run, run directory, step, message] of each, once all commands that were begun have ended."""
    log(run, "ended with status 0")
    return [line.split("|", 4) for line in (run / "told").read_text().splitlines()]


def log(run: Path, ends: str) -> str:
    """notify.log, once it holds this behind every event."""
    deadline, text = time.monotonic() + 20, ""
    while time.monotonic() < deadline:
        text = (run / notify.LOG_NAME).read_text() if (run / notify.LOG_NAME).exists() else ""
        if 0 < text.count(" at step ") == text.count(ends):
            return text
        time.sleep(0.02)
    raise AssertionError(text)
