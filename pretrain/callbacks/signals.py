"""SIGTERM, SIGUSR1, Ctrl-C and the file RUN_DIR/STOP: finish the step, save a checkpoint, leave. RUN_DIR/SAVE: save, and go on."""

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from pretrain import notify
from pretrain.callbacks.switches import END, SAVE, STOP, Switches
from pretrain.run_directory import SAVE_NAME, STOP_NAME
from pretrain.trainer import Callback, StepReport, Trainer
from pretrain.watchdog import Watchdog

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
AGAIN_S = 5.0
"""torchrun passes a signal on that has reached its whole process group already: one that comes within this time is the same."""
JOB_VARIABLE = "START_DIRECTORY"
"""In the environment of what slurm/lib/launch.sh starts."""
LOST_S = 10.0
"""After a signal, how long a rank whose peer is gone may take to notice by itself: NCCL does not."""


class StopOnSignal(Callback):
    """A signal may reach only some ranks, and not all during the same step: each step the ranks agree on the highest number.

    Python's handlers run between two instructions of the main thread, which may be waiting for other ranks. So a thread reads the
    numbers from the descriptor that the interpreter writes them to at once: it answers the first signal, ends the process at a
    second SIGTERM (not in a job) or SIGINT, and where the process that launched us ends us because another rank has died.
    """

    doing = "agreeing on signals"

    def __init__(self, device: torch.device, watchdog: Watchdog, switches: Switches | None = None):
        """switches: rank 0's."""
        self.received, self.switches = 0, switches
        self.asked = torch.zeros(2, dtype=torch.int32, device=device)
        """Signal and switch."""
        self.watchdog = watchdog
        # slurmd, srun and torchrun each pass Slurm's TERM on, on a node that is busy many seconds apart; its KILL is the end.
        self._end_at_once = ("SIGINT",) if os.environ.get(JOB_VARIABLE) else ("SIGTERM", "SIGINT")
        self._asked: float | None = None
        self._numbers, descriptor = os.pipe()
        os.set_blocking(descriptor, False)
        for number in HANDLED:
            signal.signal(number, self._receive)
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)
        threading.Thread(target=self._answer, name="signals", daemon=True).start()

    def _receive(self, number, frame):
        self.received = number

    def _answer(self) -> None:
        first = True
        while number := os.read(self._numbers, 1):
            # The interpreter writes the number of every signal that anybody has a Python handler for.
            if number[0] not in HANDLED:
                continue
            name = signal.Signals(number[0])
            self.received = int(name)
            again = self._asked is not None and time.monotonic() - self._asked > AGAIN_S
            if name != signal.SIGUSR1 and self._asked is None:
                self._asked = time.monotonic()
                threading.Thread(target=self._notice_the_dead, name="lost ranks", daemon=True).start()
            if first:
                self._tell(
                    f"{name.name}: finishing the step and saving, then ending; a second {' or '.join(self._end_at_once)} ends at once"
                )
                first = False
            if again and name.name in self._end_at_once:
                self._tell(f"{name.name} again: ending at once, without a checkpoint of this step")
                os._exit(128 + int(name))

    def _notice_the_dead(self) -> None:
        while not (lost := self.watchdog.lost()):
            time.sleep(1)
        time.sleep(LOST_S)
        doing = self.watchdog.progress.now
        told = f"rank {dist.get_rank()}: ends {doing}, the processes of ranks {lost} are gone"
        print(told, file=sys.stderr, flush=True)
        self.watchdog.alarm("failure", told, self.watchdog.speaks)
        notify.linger()
        os._exit(1)

    def _tell(self, text: str) -> None:
        if self.watchdog.rank == 0:
            print(text, flush=True)

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.asked[0], self.asked[1] = self.received, self.switches.look() if self.switches is not None else 0
        dist.all_reduce(self.asked, op=dist.ReduceOp.MAX)
        number, switch = self.asked.tolist()
        if trainer.finished:
            return
        if number or switch == END:
            trainer.request_stop(signal.Signals(number or signal.SIGUSR1).name)
        elif switch == STOP:
            trainer.request_stop(f"{STOP_NAME} is there")
        elif switch == SAVE:
            self._tell(f"{SAVE_NAME}: saving a checkpoint after step {report.step}")
            trainer.request_save()
