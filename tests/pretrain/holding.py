"""A run that waits for a test where it would otherwise be over before the test gets to act.

`python -m tests.pretrain.holding MODULE ARGUMENT...` is `python -m MODULE ARGUMENT...`, which does so as the environment variable HOLD
says: a step and a file. Nothing in the project knows of it.
"""

import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.pretrain.launch import TIMEOUT_S
from tests.tracking.server import wait_for


@dataclass(frozen=True)
class Hold:
    """All ranks wait at the end of a step, which is in the journal by then, until the file is there. For `before` of a forked run."""

    step: int
    until: Path

    def __call__(self, rank: int) -> None:
        from pretrain.callbacks.checkpointing import SaveCheckpoints

        after_step = SaveCheckpoints.after_step

        def held(callback, trainer, report) -> None:
            after_step(callback, trainer, report)
            if report.step == self.step:
                wait_for(self.until.exists, TIMEOUT_S, f"{self.until} to let the run go on")

        SaveCheckpoints.after_step = held


if __name__ == "__main__":
    from pretrain.config import parse
    from pretrain.libraries import prepare

    step, until = os.environ["HOLD"].split(",")
    module = sys.argv.pop(1)
    prepare(parse().device)
    Hold(int(step), Path(until))(int(os.environ["RANK"]))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
