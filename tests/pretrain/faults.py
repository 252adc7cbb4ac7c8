"""Faults of one rank, by the environment variable FAULT: rank, step and what happens then. For `python -m tests.pretrain.faults`
under the real launcher in place of pretrain.train, and as `before` of a forked run. Nothing in the project knows of it."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from unittest import mock


def _raise() -> None:
    raise ArithmeticError("a fault of this test")


WHAT = {
    "raises": _raise,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleeps": lambda: time.sleep(3600),
}


@dataclass(frozen=True)
class Fault:
    """`where`: "data", "step" (its forward pass) or "callback" (the metrics')."""

    rank: int
    step: int
    where: str
    what: str

    def __call__(self, rank: int) -> None:
        if rank != self.rank:
            return
        import pretrain.run
        from megatron_qsparse.parallel import schedule

        calls = 0
        due = self.step * (1 if self.where == "callback" else 2)

        def reached() -> None:
            nonlocal calls
            calls += 1
            if calls == due:
                WHAT[self.what]()

        if self.where == "data":
            original = pretrain.run.TokenDataset._read

            def read(*args):
                reached()
                return original(*args)

            mock.patch.object(pretrain.run.TokenDataset, "_read", read).start()
        elif self.where == "step":
            forward = schedule.ScheduledModel.forward

            def slow(model, *args, **kwargs):
                if model.training:
                    reached()
                return forward(model, *args, **kwargs)

            mock.patch.object(schedule.ScheduledModel, "forward", slow).start()
        else:
            log = pretrain.run.LogMetrics.after_step

            def failing(*args):
                reached()
                return log(*args)

            mock.patch.object(pretrain.run.LogMetrics, "after_step", failing).start()


if __name__ == "__main__":
    rank, step, where, what = os.environ["FAULT"].split(",")
    from pretrain.config import parse
    from pretrain.libraries import prepare
    from pretrain.train import main

    prepare(parse().device)
    Fault(int(rank), int(step), where, what)(int(os.environ["RANK"]))
    sys.exit(main())
