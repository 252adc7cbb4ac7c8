"""Ends the run where another process has taken its directory: what is written from then on would be mixed with that one's."""

from pretrain.lease import Lease
from pretrain.trainer import Callback, StepReport, Trainer


class KeepLease(Callback):
    """lease: rank 0's; None on the others, which end when rank 0 does."""

    doing = "looking after the lease"

    def __init__(self, lease: Lease | None):
        self.lease = lease

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Raises LeaseLost."""
        if self.lease is not None:
            self.lease.check()
