"""The thread that ships a run's journals while it trains."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from pretrain.tracking.shipper import Shipper
from pretrain.tracking.store import shipping_errors

logger = logging.getLogger(__name__)

PASS_INTERVAL_S = 1.0
LONGEST_PAUSE_S = 60.0
CLOSING_PAUSE_S = 0.5


class ShippingThread(threading.Thread):
    """Repeats `Shipper.ship` until `finish`; after a failure it waits 1, 2, 4, ... at most 60 seconds.

    A daemon: a request that hangs cannot keep the process alive. An outage is reported once at its beginning and once at
    its end.
    """

    def __init__(self, run_directory: Path, uri: str) -> None:
        super().__init__(name="mlflow-shipper", daemon=True)
        # Imports MLflow here, in the caller's thread: a data loader forked while another thread imports would inherit
        # that thread's import locks, locked for ever.
        self._errors = shipping_errors()
        self._shipper = Shipper(run_directory, uri, keep_going=lambda: time.monotonic() < self._deadline)
        self._closing = threading.Event()
        self._deadline = float("inf")
        self.complete = False

    def finish(self, timeout_s: float) -> bool:
        """Ship what is left for at most `timeout_s` seconds; True when the store has everything. Never raises."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self.join(timeout_s)
        return self.complete

    def run(self) -> None:
        pause, outage = PASS_INTERVAL_S, False
        announced = False
        while True:
            # Read before the pass: what is journaled before `finish` is then surely part of the last pass.
            closing = self._closing.is_set()
            try:
                self._shipper.ship()
                if closing and self._shipper.is_complete():
                    self.complete = True
                    break
            except self._errors as error:
                if not outage:
                    logger.warning("MLflow does not take the metrics (%s): they stay in the journal, training goes on", _brief(error))
                pause = min(LONGEST_PAUSE_S, 2 * pause) if outage else PASS_INTERVAL_S
                outage = True
            else:
                if outage:
                    logger.warning("MLflow takes the metrics again")
                pause, outage = PASS_INTERVAL_S, False
                if not announced:
                    logger.info("MLflow run: %s", self._shipper.place)
                    announced = True
            if closing:
                if time.monotonic() + CLOSING_PAUSE_S > self._deadline:
                    break
                time.sleep(CLOSING_PAUSE_S)
            else:
                self._closing.wait(pause)
        self._shipper.close()


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
