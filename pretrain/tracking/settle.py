"""The end of runs that no process owns any more: what a killed process could not say or ship itself.

A process can be killed after its last checkpoint and before it has written its status, or while it ships the rest. Nobody
resumes such a run, since it is complete: `settle` says how it ended and ships what is missing.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.tracking.journal import last_timestamp_ms
from pretrain.tracking.record import RECORD_NAME, RunRecord
from pretrain.tracking.shipper import Shipper
from pretrain.tracking.state import METRICS_NAME, ShippingState, unshipped_points
from pretrain.tracking.store import brief, resolve_uri, shipping_errors

if TYPE_CHECKING:
    from pretrain.tracking.tracker import TrackingConfig

logger = logging.getLogger(__name__)


def settle(config: TrackingConfig, run_directory: str | Path, status: str = "FINISHED") -> bool:
    """Give a run whose process is gone its status if it still says RUNNING, and ship once what MLflow lacks of it.

    Nothing is asked of MLflow when it has everything. The rest goes to `config.uri` or MLFLOW_TRACKING_URI where one is
    set, else to where the run was tracked: the default store depends on the current directory. Waits for at most
    `config.drain_timeout_s` seconds, and raises nothing for MLflow, network or disk reasons.

    Returns:
        whether everything has arrived; also True where there is nothing to ship (never tracked, `config.enabled` false).
    """
    directory = Path(run_directory).absolute()
    if not (directory / RECORD_NAME).exists():
        return True
    try:
        record = RunRecord.load(directory)
        uri = resolve_uri(config.uri) if config.uri or os.environ.get("MLFLOW_TRACKING_URI") else record.uri
        if record.status == "RUNNING":
            with closing(Shipper(directory, uri)) as shipper:
                shipper.lock()  # a process that ships this directory owns the run
                record = end_record(directory, status)
        if not config.enabled or ShippingState.load(directory).has_everything(record, directory):
            return True
    except (OSError, ValueError) as error:
        logger.warning("cannot settle the tracking of %s: %s", directory, error)
        return False
    if _ship(directory, uri, config.drain_timeout_s):
        return True
    report_rest(directory)
    return False


def end_record(run_directory: Path, status: str) -> RunRecord:
    """The record of a run without a process; one that says RUNNING gets `status`, as of the last journaled step.

    Raises:
        OSError, ValueError: run.json cannot be read or written, or is damaged.
    """
    record = RunRecord.load(run_directory)
    if record.status == "RUNNING":
        record.end(status, last_timestamp_ms(run_directory / METRICS_NAME) or time.time_ns() // 1_000_000)
        record.save(run_directory)
    return record


def report_rest(run_directory: Path) -> None:
    """Say what MLflow lacks of a run and the command that ships it."""
    try:
        points = unshipped_points(run_directory)
    except (OSError, ValueError) as error:
        logger.warning("cannot count the points that MLflow lacks: %s", error)
        return
    rest = f"{points:,} points are only in" if points else "not everything reached MLflow from"
    command = shlex.join([sys.executable, "-m", "pretrain.tracking", "sync", str(run_directory)])
    logger.warning("%s %s; ship them with: %s", rest, run_directory, command)


def _ship(run_directory: Path, uri: str, timeout_s: float) -> bool:
    """One pass in a thread that is left alone when it hangs; True when everything has arrived."""
    errors = shipping_errors()
    deadline = time.monotonic() + timeout_s
    shipper = Shipper(run_directory, uri, keep_going=lambda: time.monotonic() < deadline)
    arrived = []

    def ship() -> None:
        try:
            shipper.ship()
            arrived.append(shipper.is_complete())
        except errors as error:
            logger.warning("MLflow at %s does not take the rest of %s: %s", uri, run_directory, brief(error))
        finally:
            shipper.close()

    thread = threading.Thread(target=ship, name="mlflow-settle", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return any(arrived)
