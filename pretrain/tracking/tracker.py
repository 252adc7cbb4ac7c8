"""What the trainer's tracking rank uses: `log` once a step, `close` at the end.

    tracker = Tracker(config.tracking, run_directory, params=flat, tags=collect_environment(), artifacts=[config_yaml])
    tracker.log({"train/loss": 5.03, "train/lr": 1.2e-3}, step=12)
    tracker.close("FINISHED")

`log` writes to the local journal and returns; MLflow being slow, down or full is the shipping thread's matter.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pretrain.tracking.background import PREVIOUS_NAME, ShippingThread
from pretrain.tracking.journal import Journal, discarded_path, first_step, truncate_after
from pretrain.tracking.record import ARTIFACTS_NAME, RECORD_NAME, DatasetInput, RunRecord
from pretrain.tracking.settle import end_record, report_rest
from pretrain.tracking.shipper import RUN_ID_NAME
from pretrain.tracking.state import METRICS_NAME, STATE_NAME, SYSTEM_NAME
from pretrain.tracking.store import resolve_uri, validate_uri
from pretrain.tracking.system import SystemSampler

logger = logging.getLogger(__name__)

KILLED_DRAIN_S = 5.0
"""A process that was told to stop has little time: torchrun kills it 30 s after passing SIGTERM on, checkpoint included."""
DAY_S = 86400
STATUSES = ("FINISHED", "FAILED", "KILLED")


@dataclass(kw_only=True)
class TrackingConfig:
    """Experiment tracking."""

    experiment: str = "megatron-qsparse"
    """MLflow experiment; created when missing. Runs to be compared belong to one experiment."""
    run_name: str = ""
    """Name of the run; "" means the run directory's name."""
    enabled: bool = True
    """Ship to MLflow. The journal is written either way, and `python -m pretrain.tracking sync` can ship it later."""
    uri: str = ""
    """MLflow tracking URI; "" means MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the current directory."""
    system_metrics: bool = True
    """Sample processor, memory, disk, network and GPUs of the tracking rank's machine into system.jsonl."""
    system_metrics_interval_s: float = 10.0
    """Seconds between two such samples, > 0 and at most a day."""
    tags: dict[str, str] = field(default_factory=dict)
    """Further MLflow tags of the run."""
    drain_timeout_s: float = 30.0
    """Longest time in seconds that the end of a run waits for MLflow to take the last points, 0 to a day."""

    def problems(self) -> list[str]:
        """What cannot work in these settings, one sentence each; empty when nothing is wrong."""
        found = []
        if not self.experiment.strip():
            found.append("tracking.experiment is empty: give the MLflow experiment a name")
        if not 0 < self.system_metrics_interval_s <= DAY_S:
            interval = self.system_metrics_interval_s
            found.append(f"tracking.system_metrics_interval_s is {interval}: it must be larger than 0 and at most {DAY_S} seconds")
        if not 0 <= self.drain_timeout_s <= DAY_S:
            found.append(f"tracking.drain_timeout_s is {self.drain_timeout_s}: it must be at least 0 and at most {DAY_S} seconds")
        problem = validate_uri(self.uri) if self.enabled else None
        return [*found, problem] if problem else found


class Tracker:
    """Journal and shipping thread of one run. One process per run directory, one thread calling `log`.

    Args:
        config: the settings.
        run_directory: created when missing.
        params: resolved configuration with dotted names; values are stored as `str(value)`.
        tags: facts about this session, such as `collect_environment()`; `config.tags` are added.
        datasets: data sets the run reads.
        artifacts: existing files to upload, such as config.yaml, under their names, which must differ; copied at once.
        resumed_from_step: step of the checkpoint that training goes on from: the journal is cut behind it and the MLflow
            run goes on; 0 where the run was killed before its first one. None starts a new run; what an earlier one left in
            the directory moves to `previous/N`.

    Attributes:
        is_new_run: the run's first line (parameter counts and the like, at step 0) is still to be logged: the run begins,
            or its record and its journal were lost.

    Raises:
        ValueError: settings that cannot work, or a damaged run.json on resume.
        OSError: the run directory cannot be written or an artifact cannot be read.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_directory: str | Path,
        *,
        params: Mapping[str, Any],
        tags: Mapping[str, Any] | None = None,
        datasets: Iterable[DatasetInput] = (),
        artifacts: Iterable[Path] = (),
        resumed_from_step: int | None = None,
    ) -> None:
        if problems := config.problems():
            raise ValueError("; ".join(problems))
        self._config = config
        self._directory = Path(run_directory).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        metrics_path = self._directory / METRICS_NAME
        uri = resolve_uri(config.uri)
        tags = {**(tags or {}), **config.tags}
        record = RunRecord(experiment=config.experiment, run_name=config.run_name or self._directory.name, uri=uri)
        if resumed_from_step is None:
            _set_aside(self._directory)
            record.begin(params, tags, datasets, artifacts, self._directory)
        else:
            size = truncate_after(metrics_path, resumed_from_step)
            if resumed_from_step and not size:
                logger.warning("%s holds nothing up to step %d any more: only MLflow knows these steps", metrics_path, resumed_from_step)
            if (self._directory / RECORD_NAME).exists():
                record = RunRecord.load(self._directory)
                record.uri = uri
                _part_from_original(record, self._directory, tags)
                record.run_name = config.run_name or record.run_name
                if config.experiment != record.experiment:
                    logger.warning("tracking.experiment=%s: the run stays in %s, where it was begun", config.experiment, record.experiment)
                record.resume(params, tags, datasets, artifacts, self._directory, resumed_from_step, size)
            else:
                # Without the record nobody knows where the journal was cut before: ship all of it again.
                (self._directory / STATE_NAME).unlink(missing_ok=True)
                record.begin(params, tags, datasets, artifacts, self._directory)
        record.directory = str(self._directory)
        record.save(self._directory)
        self.is_new_run = first_step(metrics_path) != 0 and (resumed_from_step == 0 or not record.journal_bytes_at_resume)
        self._record = record
        self._journal = Journal(metrics_path)
        interval = config.system_metrics_interval_s
        self._sampler = SystemSampler(self._directory / SYSTEM_NAME, interval) if config.system_metrics else None
        self._shipping = ShippingThread(self._directory, uri) if config.enabled else None
        if self._shipping:
            self._shipping.start()
        self._closed, self._process_id = False, os.getpid()
        # A process that leaves without closing has failed; without this its run would stay RUNNING in MLflow for ever.
        atexit.register(self.close, "FAILED")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Journal the metrics of a step. Call once a step with everything it has, with growing steps.

        A full disk costs one warning (lines wait in memory until it has room), MLflow never anything.

        Raises:
            ValueError: a metric called "step" or "timestamp_ms".
            TypeError: a value that is no number.
        """
        self._journal.append(step, metrics)

    def close(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """End the run: give MLflow `drain_timeout_s` seconds (KILLED: at most 5) to take the rest and the status, say what it did not take.

        Raises nothing for MLflow, network or disk reasons, and leaves the exit code alone. Closing twice does nothing.

        Raises:
            ValueError: an unknown status.
        """
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
        if not self._end():
            return
        if self._sampler:
            self._sampler.stop()
        self._journal.close()
        self._record.end(status, time.time_ns() // 1_000_000)
        try:
            self._record.save(self._directory)
        except OSError as error:
            logger.warning("cannot write %s (%s): MLflow will not learn that the run is %s", self._directory / RECORD_NAME, error, status)
        drain_s = self._config.drain_timeout_s
        if status == "KILLED":
            drain_s = min(drain_s, KILLED_DRAIN_S)
        if self._shipping and not self._shipping.finish(drain_s):
            report_rest(self._directory)

    def abandon(self) -> None:
        """End without a word: the run directory belongs to another process, whose record, journal and status these are now."""
        if not self._end():
            return
        if self._sampler:
            self._sampler.abandon()
        self._journal.abandon()
        if self._shipping:
            self._shipping.abandon()

    def _end(self) -> bool:
        """True where it had not ended yet."""
        if self._closed or os.getpid() != self._process_id:
            return False  # the second case: a forked child that leaves through sys.exit runs our atexit hook
        self._closed = True
        atexit.unregister(self.close)
        return True


def _part_from_original(record: RunRecord, directory: Path, tags: dict[str, Any]) -> None:
    """A copy of a run directory that goes on beside its original is another run in MLflow: both would write the same steps."""
    original = record.original(directory)
    if original is None:
        return
    for name in (RUN_ID_NAME, STATE_NAME):
        (directory / name).unlink(missing_ok=True)
    record.key, record.run_name = RunRecord(experiment="", run_name="", uri="").key, directory.name
    tags["copied_from"] = str(original)
    logger.warning("%s is a copy of %s: it goes on as another run in MLflow", directory, original)


def _set_aside(directory: Path) -> None:
    """Move an earlier run's tracking files to previous/N, its run id included; shipping goes on there.

    One that still says RUNNING was killed without a word and is KILLED.
    """
    names = [RECORD_NAME, METRICS_NAME, discarded_path(Path(METRICS_NAME)).name, SYSTEM_NAME, RUN_ID_NAME, STATE_NAME, ARTIFACTS_NAME]
    found = [directory / name for name in names if (directory / name).exists()]
    if not found:
        return
    # Any of them may have been removed meanwhile.
    number = 1 + max((int(path.name) for path in (directory / PREVIOUS_NAME).glob("*") if path.name.isdecimal()), default=0)
    target = directory / PREVIOUS_NAME / str(number)
    target.mkdir(parents=True)
    for path in found:
        path.replace(target / path.name)
    with suppress(FileNotFoundError, ValueError):  # no record, or a damaged one: it stays what it is
        end_record(target, "KILLED")
    logger.warning("%s holds an earlier run that is not resumed: its tracking files moved to %s", directory, target)
