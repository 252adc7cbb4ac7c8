"""Ends the run where another process has taken its directory: what is written from then on would be mixed with that one's."""

from pretrain.lease import Lease, LeaseLost
from pretrain.trainer import Callback, StepReport, Stopped, Trainer


class KeepLease(Callback):
    """lease: rank 0's; None on the others, which end when rank 0 does. First of the callbacks: before anything is written."""

    doing = "looking after the lease"

    def __init__(self, lease: Lease | None):
        self.lease = lease

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Raises Stopped, on rank 0; the others lose contact with it."""
        try:
            if self.lease is not None:
                self.lease.check()
        except LeaseLost as error:
            raise Stopped(f"{error}: see whether that run is meant to go on, and start this one elsewhere") from error
