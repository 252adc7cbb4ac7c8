"""The thread that ships a run's journals while it trains."""

from __future__ import annotations

import errno
import logging
import threading
import time
from contextlib import suppress
from pathlib import Path

from pretrain.tracking.record import RunRecord
from pretrain.tracking.shipper import RUN_ID_NAME, Shipper
from pretrain.tracking.state import ShippingState
from pretrain.tracking.store import brief, shipping_errors

logger = logging.getLogger(__name__)

PASS_INTERVAL_S = 1.0
LONGEST_PAUSE_S = 60.0
CLOSING_PAUSE_S = 0.5
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Of the run directory's disk."""
PREVIOUS_NAME = "previous"
"""Folder of a run directory that keeps what runs before the present one have left there."""


class ShippingThread(threading.Thread):
    """Repeats `Shipper.ship` until `finish`; after a failure it waits 1, 2, 4, ... at most 60 seconds.

    A daemon: a request that hangs cannot keep the process alive. An outage is reported once at its beginning and once at
    its end, the place of the run in MLflow as soon as it is known.
    """

    def __init__(self, run_directory: Path, uri: str) -> None:
        super().__init__(name="mlflow-shipper", daemon=True)
        self._run_directory = run_directory
        # Imports MLflow here, in the caller's thread: a data loader forked while another thread imports would inherit
        # that thread's import locks, locked for ever.
        self._errors = shipping_errors()
        self._shipper = Shipper(run_directory, uri, self._keep_going)
        self._closing = threading.Event()
        self._deadline = float("inf")
        self._abandoned = False
        self.complete = False

    def finish(self, timeout_s: float) -> bool:
        """Ship what is left for at most `timeout_s` seconds; True when the store has everything. Never raises."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self.join(timeout_s)
        return self.complete

    def abandon(self) -> None:
        """Ship nothing more; a request under way is left to itself."""
        self._abandoned = True
        self.finish(0.0)

    def run(self) -> None:
        pause, outage = PASS_INTERVAL_S, False
        announced = previous_shipped = False
        while not self._abandoned:
            # Read before the pass: what is journaled before `finish` is then surely part of the last pass.
            closing = self._closing.is_set()
            try:
                self._shipper.ship()
                self.complete = closing and self._shipper.is_complete()
            except self._errors as error:
                if not outage and isinstance(error, OSError) and error.errno in FULL:
                    logger.warning("%s cannot be written (%s): metrics are shipped later, training goes on", self._run_directory, error)
                elif not outage:
                    logger.warning("MLflow does not take the metrics (%s): they stay in the journal, training goes on", brief(error))
                pause = min(LONGEST_PAUSE_S, 2 * pause) if outage else PASS_INTERVAL_S
                outage = True
            else:
                if outage:
                    logger.warning("metrics are shipped again")
                pause, outage = PASS_INTERVAL_S, False
            if self._shipper.place and not announced:
                self._announce()
                announced = True
            if not outage and not previous_shipped:
                self._ship_previous()
                previous_shipped = True
            if self.complete:
                break
            if closing:
                if time.monotonic() + CLOSING_PAUSE_S > self._deadline:
                    break
                time.sleep(CLOSING_PAUSE_S)
            else:
                self._closing.wait(pause)
        self._shipper.close()

    def _keep_going(self) -> bool:
        return time.monotonic() < self._deadline

    def _announce(self) -> None:
        with suppress(OSError, ValueError):  # whoever reads the standard output may be gone
            print(f"MLflow run: {self._shipper.place}", flush=True)

    def _ship_previous(self) -> None:
        """Bring runs that stood here before to their end in MLflow, where it holds them as running.

        Tried once a session, where each was tracked; a store that refuses them does not hold up the present run.
        """
        for run_id_path in sorted((self._run_directory / PREVIOUS_NAME).glob(f"*/{RUN_ID_NAME}")):
            directory = run_id_path.parent
            try:
                record = RunRecord.load(directory)
                if ShippingState.load(directory).has_everything(record, directory):
                    continue
                shipper = Shipper(directory, record.uri, self._keep_going)
                try:
                    shipper.ship()
                finally:
                    shipper.close()
            except self._errors as error:
                logger.warning("MLflow does not take the rest of %s: %s", directory, brief(error))
