"""Brings the journals of one run directory to MLflow, from wherever the last attempt stopped.

`Shipper.ship` does one pass and lets errors out; background.py repeats passes in a thread, `sync` runs one by hand.
A pass: find or create the run, send new journal lines (at most 1000 metrics a request, with their own timestamps), then
parameters, tags and data sets if they changed, the status, and artifacts. Metrics come first, so that nothing else can
hold them up.

Why everything arrives once. `shipped.json` holds the byte offset reached in each journal and is replaced atomically
after each batch. A batch whose answer was lost is sent again; MLflow drops points equal in key, step, timestamp and
value. A step trained again after a resume gets the first point's timestamp where its value is the same, so it is dropped
as well; where it differs it becomes a second point, and readers take the newest.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.tracking.entities import FirstPoints, dataset_of, discarded_points, params_of, points_of, tags_of
from pretrain.tracking.journal import discarded_path, iterate_lines
from pretrain.tracking.record import ARTIFACTS_NAME, RunRecord
from pretrain.tracking.state import METRICS_NAME, SYSTEM_NAME, ShippingState
from pretrain.tracking.store import connect, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

RUN_ID_NAME = "run_id"
LOCK_NAME = ".shipping.lock"
METRICS_PER_REQUEST = 1000
PAIRS_PER_REQUEST = 100


class BusyError(OSError):
    """Another process is shipping this run directory."""


class Shipper:
    """Ships one run directory. Used by one thread at a time; a lock file keeps a second process out.

    Args:
        run_directory: holds run.json and the journals.
        uri: resolved tracking URI (`store.resolve_uri`).
        keep_going: asked between requests; False ends a pass early.
    """

    def __init__(self, run_directory: Path, uri: str, keep_going: Callable[[], bool] = lambda: True) -> None:
        self.run_directory = run_directory
        self.uri = uri
        self.place = ""
        self._keep_going = keep_going
        self._client: MlflowClient | None = None
        self._lock_descriptor = -1
        self._run_is_known = False
        self._first_points: FirstPoints | None = None
        self._state = ShippingState()

    def ship(self) -> int:
        """One pass over everything that is new.

        Returns:
            how many points were sent.

        Raises:
            BusyError: another process ships this directory.
            FileNotFoundError, ValueError: no run.json, or a damaged one.
            the errors of `store.shipping_errors()`: the store did not take something; call again later.
        """
        self.lock()
        record = RunRecord.load(self.run_directory)
        self._client = self._client or connect(self.uri)
        run_id = self._run(record)
        self._run_is_known = False  # if this pass fails, the next one looks first: the database may have been replaced
        points = sum(self._ship_journal(run_id, name) for name in (METRICS_NAME, SYSTEM_NAME))
        if self._keep_going():
            self._ship_description(run_id, record)
            self._ship_status(run_id, record)
            self._ship_artifacts(run_id, record)
        self._run_is_known = True
        return points

    def is_complete(self) -> bool:
        """Whether the store holds everything the run directory does, the status included."""
        return self._state.has_everything(RunRecord.load(self.run_directory), self.run_directory)

    def close(self) -> None:
        """Let other processes ship this directory."""
        if self._lock_descriptor >= 0:
            os.close(self._lock_descriptor)
            self._lock_descriptor = -1

    def lock(self) -> None:
        """Keep other processes from shipping this directory until `close`. Raises BusyError if one does."""
        if self._lock_descriptor >= 0:
            return
        descriptor = os.open(self.run_directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise BusyError(f"{self.run_directory} is being shipped by another process") from error
        except OSError as error:  # a file system without locks: replaying twice is harmless, so go on without
            logger.debug("no lock on %s: %s", self.run_directory, error)
        self._lock_descriptor = descriptor

    def _run(self, record: RunRecord) -> str:
        """The id of the MLflow run, created if the store has none; loads the shipping state that belongs to it."""
        if self._run_is_known and self._state.session == len(record.journal_bytes_at_resume):
            return self._state.run_id
        run_id = self._find_run(record) or self._create_run(record)
        state = ShippingState.load(self.run_directory)
        if (state.uri, state.run_id) != (self.uri, run_id):
            state = ShippingState(uri=self.uri, run_id=run_id, session=len(record.journal_bytes_at_resume))
        state.enter_session(record)
        self._state, self._run_is_known = state, True
        self._first_points = None
        self._state.save(self.run_directory)
        return run_id

    def _find_run(self, record: RunRecord) -> str | None:
        from mlflow.exceptions import MlflowException

        path = self.run_directory / RUN_ID_NAME
        run_id = path.read_text().strip() if path.exists() else ""
        if run_id:
            try:
                run = self._client.get_run(run_id)
                self._note_place(run.info.experiment_id, run_id)
                return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                logger.warning("MLflow at %s does not know run %s of %s: creating it there", self.uri, run_id, self.run_directory)
        experiment = self._client.get_experiment_by_name(record.experiment)
        if experiment is None:
            return None
        found = self._client.search_runs([experiment.experiment_id], f"tags.`tracking.key` = '{record.key}'", max_results=1)
        if not found:
            return None
        self._keep_run_id(experiment.experiment_id, found[0].info.run_id)
        return found[0].info.run_id

    def _create_run(self, record: RunRecord) -> str:
        experiment = self._client.get_experiment_by_name(record.experiment)
        if experiment is None:
            database = sqlite_path(self.uri)
            # Without a server MLflow would put artifacts below whatever the current directory is.
            location = (database.parent / "mlartifacts").as_uri() if database else None
            experiment_id = self._client.create_experiment(record.experiment, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        tags = {"tracking.key": record.key, "mlflow.source.type": "LOCAL"}
        tags |= {"mlflow.user": record.tags["user"]} if "user" in record.tags else {}
        tags |= {"mlflow.source.name": record.tags["command"]} if "command" in record.tags else {}
        run = self._client.create_run(experiment_id, start_time=record.started_ms, tags=tags, run_name=record.run_name)
        self._keep_run_id(experiment_id, run.info.run_id)
        return run.info.run_id

    def _keep_run_id(self, experiment_id: str, run_id: str) -> None:
        beside = self.run_directory / f".{RUN_ID_NAME}.{os.getpid()}"
        beside.write_text(run_id + "\n")
        beside.replace(self.run_directory / RUN_ID_NAME)
        self._note_place(experiment_id, run_id)

    def _note_place(self, experiment_id: str, run_id: str) -> None:
        is_server = self.uri.startswith("http")
        self.place = f"{self.uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}" if is_server else f"{run_id} in {self.uri}"

    def _ship_journal(self, run_id: str, name: str) -> int:
        offset = self._state.offsets.get(name, 0)
        sent = 0
        batch: list[Metric] = []
        for line, behind in iterate_lines(self.run_directory / name, offset):
            points = points_of(self.run_directory / name, line, self._discarded_points() if name == METRICS_NAME else {})
            if batch and len(batch) + len(points) > METRICS_PER_REQUEST:
                sent += self._send(run_id, name, batch, offset)
                batch = []
                if not self._keep_going():
                    return sent
            batch += points
            offset = behind
        if offset != self._state.offsets.get(name, 0):
            sent += self._send(run_id, name, batch, offset)
        return sent

    def _send(self, run_id: str, name: str, batch: list[Metric], offset: int) -> int:
        for start in range(0, len(batch), METRICS_PER_REQUEST):
            self._client.log_batch(run_id, metrics=batch[start : start + METRICS_PER_REQUEST])
        self._state.offsets[name] = offset
        self._state.save(self.run_directory)
        return len(batch)

    def _discarded_points(self) -> FirstPoints:
        if self._first_points is None:
            self._first_points = discarded_points(discarded_path(self.run_directory / METRICS_NAME))
        return self._first_points

    def _ship_description(self, run_id: str, record: RunRecord) -> None:
        from mlflow.entities import RunTag

        digest = record.description_digest()
        if self._state.description == digest:
            return
        self._client.update_run(run_id, name=record.run_name)
        params, tags = params_of(record), tags_of(record)
        # Parameters can be written once. They differ where run.json was lost and begun anew: those of then stay, as at a resume.
        known = self._client.get_run(run_id).data.params
        tags += [RunTag(f"resume.0.{param.key}", param.value) for param in params if known.get(param.key, param.value) != param.value]
        params = [param for param in params if param.key not in known]
        for start in range(0, len(params), PAIRS_PER_REQUEST):
            self._client.log_batch(run_id, params=params[start : start + PAIRS_PER_REQUEST])
        for start in range(0, len(tags), PAIRS_PER_REQUEST):
            self._client.log_batch(run_id, tags=tags[start : start + PAIRS_PER_REQUEST])
        if record.datasets:
            self._client.log_inputs(run_id, [dataset_of(item) for item in record.datasets])
        self._state.description = digest
        self._state.save(self.run_directory)

    def _ship_status(self, run_id: str, record: RunRecord) -> None:
        if self._state.status == record.status:
            return
        if record.status == "RUNNING":
            self._client.update_run(run_id, status="RUNNING")
        else:
            self._client.set_terminated(run_id, status=record.status, end_time=record.ended_ms or int(time.time() * 1000))
        self._state.status = record.status
        self._state.save(self.run_directory)

    def _ship_artifacts(self, run_id: str, record: RunRecord) -> None:
        for artifact in record.artifacts:
            if artifact.name not in self._state.artifacts and self._keep_going():
                path = self.run_directory / ARTIFACTS_NAME / artifact.name
                if path.exists():
                    self._client.log_artifact(run_id, str(path))
                else:
                    logger.warning("%s is missing: MLflow will not have it", path)
                self._state.artifacts.append(artifact.name)
                self._state.save(self.run_directory)
