"""Files by which somebody without access to the processes asks a run for something: `touch RUN_DIR/STOP`, `touch RUN_DIR/SAVE`.

A job's script leaves one as well when it is signalled (slurm/lib/survive.sh): where Slurm follows processes by cgroups, its signals
reach the first process of each task alone, and containers may keep them.
"""

import contextlib
import os
import time
from pathlib import Path

from pretrain.run_directory import SAVE_NAME, STOP_NAME

NOTHING, SAVE, END, STOP = 0, 1, 2, 3
END_NAME, END_FOLDER = "signalled", "START_DIRECTORY"
"""RUN_DIR/slurm/JOB.RESTART/signalled, and the variable with that folder."""
LOOK_S = 5.0
"""Between two looks: a shared file system answers slowly."""


class Switches:
    """For rank 0."""

    def __init__(self, run_directory: Path):
        self.stop, self.save = run_directory / STOP_NAME, run_directory / SAVE_NAME
        folder = os.environ.get(END_FOLDER)
        self.end = Path(folder) / END_NAME if folder else None
        self._looked = 0.0

    def look(self) -> int:
        """What is asked for. SAVE is taken away: it is for once; STOP stays, and keeps the run from being started again."""
        if time.monotonic() - self._looked < LOOK_S:
            return NOTHING
        self._looked = time.monotonic()
        # A file system that does not answer is the checkpoints' business.
        with contextlib.suppress(OSError):
            if self.stop.exists():
                return STOP
            if self.end is not None and self.end.exists():
                return END
            if self.save.exists():
                self.save.unlink()
                return SAVE
        return NOTHING
