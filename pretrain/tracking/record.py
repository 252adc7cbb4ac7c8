"""run.json: what MLflow is to know about a run besides its metrics, kept locally until a server takes it.

Parameters, tags, data sets, artifacts and the status are journaled like the metrics are, so that a run that never saw a
server can be created there later, complete. Artifacts are copied into RUN_DIR/artifacts when a session passes them: the
original may say something else by the time a server takes it.

MLflow parameters can be written once. The first session's values therefore stay; on the N-th resume each value that
differs from the one in force becomes the tag `resume.N.<name>`, for parameters and tags alike. A changed file keeps its
name's first and last part: config.yaml becomes config.resume.N.yaml.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
RECORD_NAME = "run.json"
ARTIFACTS_NAME = "artifacts"
ABSENT = "(absent)"


@dataclass(frozen=True, kw_only=True)
class DatasetInput:
    """A data set the run reads, shown by MLflow beside the run."""

    name: str
    """What people call it, such as the folder of the shards."""
    digest: str
    """Content hash; MLflow keeps the first 36 characters as the digest and the whole of it in the profile."""
    source: str
    """Path or URL of the manifest."""
    context: str = "training"
    """What the run uses it for: training, validation, ..."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A copy of a file to upload, RUN_DIR/artifacts/`name`, and the name of the file it was taken from."""

    name: str
    original: str
    sha256: str


@dataclass(kw_only=True)
class RunRecord:
    """The content of run.json."""

    experiment: str
    run_name: str
    uri: str
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag `tracking.key` of the MLflow run: finds the run again when a server created it but its answer was lost."""
    started_ms: int = 0
    ended_ms: int | None = None
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: list[DatasetInput] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    journal_bytes_at_resume: list[int] = field(default_factory=list)
    """One entry a resume: the size metrics.jsonl was cut to. Shipping goes back to it if it was further."""
    directory: str = ""
    """Where the last session found the run directory, absolute."""

    @classmethod
    def load(cls, run_directory: Path) -> RunRecord:
        """Read RUN_DIR/run.json.

        Raises:
            FileNotFoundError: the directory holds no tracked run.
            ValueError: the file is damaged or written by a newer version; the message names it.
        """
        path = run_directory / RECORD_NAME
        try:
            fields = json.loads(path.read_text())
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version}, this release reads {FORMAT_VERSION}")
            fields["datasets"] = [DatasetInput(**item) for item in fields["datasets"]]
            fields["artifacts"] = [Artifact(**item) for item in fields["artifacts"]]
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): restore it, or move it away, and the next start writes it anew") from error

    def original(self, directory: Path) -> Path | None:
        """The run directory that this one, which is there as well, is a copy of."""
        there = Path(self.directory)
        try:
            if self.directory and there != directory and not there.samefile(directory) and RunRecord.load(there).key == self.key:
                return there
        except (OSError, ValueError):
            # Moved, not copied.
            pass
        return None

    def save(self, run_directory: Path) -> None:
        """Write RUN_DIR/run.json (beside, fsync, rename)."""
        write_json(run_directory / RECORD_NAME, {"format_version": FORMAT_VERSION, **asdict(self)})

    def begin(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        datasets: Iterable[DatasetInput],
        artifacts: Iterable[Path],
        directory: Path,
    ) -> None:
        """Fill a new record with what the first session passes."""
        self.started_ms = time.time_ns() // 1_000_000
        self.params = {name: str(value) for name, value in params.items()}
        self.tags = {name: str(value) for name, value in tags.items()}
        self.datasets = list(datasets)
        self.artifacts = []
        for path in artifacts:
            self._keep(Path(path), directory, "")

    def resume(
        self,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        datasets: Iterable[DatasetInput],
        artifacts: Iterable[Path],
        directory: Path,
        step: int,
        journal_bytes: int,
    ) -> None:
        """Note a resume from `step`: what changed becomes `resume.N.*` tags, changed files get resume.N in their names."""
        number = len(self.journal_bytes_at_resume) + 1
        prefix = f"resume.{number}."
        changes = {
            **self._differences(self.params, params, number, removals=True),
            **self._differences(self.tags, tags, number, removals=False),
        }
        self.tags.update({prefix + name: value for name, value in changes.items()})
        self.tags[prefix + "from_step"] = str(step)
        self.journal_bytes_at_resume.append(journal_bytes)
        self.datasets += [item for item in datasets if item not in self.datasets]
        for path in artifacts:
            self._keep(Path(path), directory, "." + prefix.rstrip("."))
        self.status, self.ended_ms = "RUNNING", None

    def end(self, status: str, ended_ms: int) -> None:
        """Note that nothing more will come."""
        self.status, self.ended_ms = status, ended_ms

    def description_digest(self) -> str:
        """Changes whenever name, parameters, tags or data sets do."""
        described = {"name": self.run_name, "params": self.params, "tags": self.tags, "datasets": [asdict(item) for item in self.datasets]}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def _keep(self, path: Path, directory: Path, mark: str) -> None:
        """Copy a file aside with `mark` in its name, unless the session before had the same content under its name."""
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        in_force = {artifact.original: artifact.sha256 for artifact in self.artifacts}
        if in_force.get(path.name) != digest:
            name = f"{path.stem}{mark}{path.suffix}"
            (directory / ARTIFACTS_NAME).mkdir(exist_ok=True)
            write_atomically(directory / ARTIFACTS_NAME / name, content)
            self.artifacts.append(Artifact(name=name, original=path.name, sha256=digest))

    def _differences(self, first: dict[str, str], now: Mapping[str, Any], number: int, removals: bool) -> dict[str, str]:
        """Values of this session that differ from those in force; names never seen before join `first` itself."""
        in_force = dict(first)
        for earlier in range(1, number):
            for name in first:
                in_force[name] = self.tags.get(f"resume.{earlier}.{name}", in_force[name])
        changed = {}
        for name, value in now.items():
            if name not in first:
                first[name] = str(value)
            elif in_force[name] != str(value):
                changed[name] = str(value)
        if removals:
            changed |= {name: ABSENT for name in first if name not in now and in_force[name] != ABSENT}
        return changed


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old or the new content, never a part of it."""
    write_atomically(path, json.dumps(content, indent=1).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside, force it to disk and rename it. Where that fails nothing is left."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise
