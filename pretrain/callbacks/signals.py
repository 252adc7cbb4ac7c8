"""SIGTERM, SIGUSR1 and Ctrl-C: finish the step, save a checkpoint, leave."""

import signal

import torch
import torch.distributed as dist

from pretrain.trainer import Callback, StepReport, Trainer

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopOnSignal(Callback):
    """A signal may reach only some ranks, and not all during the same step: each step the ranks agree on the highest number."""

    def __init__(self, device: torch.device):
        self.received = 0
        self.flag = torch.zeros((), dtype=torch.int32, device=device)
        for number in HANDLED:
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        # torchrun passes a terminal's Ctrl-C on, so that it comes twice; who cannot wait sends SIGQUIT.
        self.received = number

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        self.flag.fill_(self.received)
        dist.all_reduce(self.flag, op=dist.ReduceOp.MAX)
        agreed = int(self.flag.item())
        if agreed and not trainer.finished:
            trainer.request_stop(signal.Signals(agreed).name)
