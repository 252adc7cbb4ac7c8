"""A tokenization job on disk: what it is, whether it is finished, and what an interrupted run has left.

    OUTPUT/.tokenize/job.json       identity of the job in progress
    OUTPUT/.tokenize/hash/          one file per unit that the hash pass has finished
    OUTPUT/.tokenize/tokens/        tokens of units that are not yet in a published shard, lengths of all
    OUTPUT/.tokenize/shards/        one entry per published shard
    OUTPUT/*.tar                    published shards
    OUTPUT/manifest.json            written last; with it the job is finished and .tokenize goes away

Two identities: `Job.digest` (contents and options) decides whether a finished output is the one that was asked for;
job.json adds modification times and library versions, and decides whether journals may be used again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from data_tools.documents import Source
from data_tools.errors import DataError, ManifestError
from data_tools.files import TEMPORARY_SUFFIX, disk_errors, fingerprint, write_atomically
from data_tools.manifest import FORMAT_VERSION, MANIFEST_NAME, SPLITS, TOKENIZER_NAME, Manifest
from data_tools.progress import warn
from data_tools.tokenizer import TokenizerFile

WORK_FOLDER = ".tokenize"
DOCUMENT_HASH = "xxh3-128"
JOURNALS = ("hash", "tokens", "shards")
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class TokenizeOptions:
    """Options of `python -m data_tools tokenize` that decide the output."""

    validation_fraction: Decimal
    """Fraction of the documents in [0, 1), decided by a hash of each document's text."""
    text_field: str
    on_invalid: str
    """`error` or `skip`."""
    backend: str
    """`auto`, `gigatoken`, `tiktoken` or `tokenizers`."""
    dtype: str
    """`uint16`, `uint32`, or `auto` until the tokenizer is known."""
    block_tokens: int
    """A block ends with the document that brings it to this many tokens."""
    shard_tokens: int
    """A shard ends with the block that brings it to this many tokens."""

    def as_json(self) -> dict[str, Any]:
        """The options as they stand in the manifest."""
        return {**self.__dict__, "validation_fraction": f"{self.validation_fraction.normalize():f}"}


class Job:
    """A job and its output folder. `with Job(...) as job` holds the folder against other runs."""

    def __init__(self, output: Path, sources: list[Source], tokenizer: TokenizerFile, options: TokenizeOptions) -> None:
        self.output = output
        self.work = output / WORK_FOLDER
        self.sources = sources
        self.source_states = [_state(source.path) for source in sources]
        self.source_entries = [
            {"name": _printable(path), "bytes": path.stat().st_size, "fingerprint": fingerprint(path)}
            for path in (source.path for source in sources)
        ]
        self.identity = {
            "format_version": FORMAT_VERSION,
            "tokenizer": tokenizer.sha256,
            "eod_id": tokenizer.eod_id,
            "document_hash": DOCUMENT_HASH,
            "options": options.as_json(),
            "sources": self.source_entries,
        }
        self.digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def is_finished(self, overwrite: bool) -> bool:
        """Whether the output of exactly this job is there. Raises DataError when something else is and `overwrite` is not set."""
        if self.output.exists() and not self.output.is_dir():
            raise DataError(f"--output {self.output} is a file: name a folder")
        if (self.output / MANIFEST_NAME).is_file():
            return self._is_published(overwrite)
        if (self.work / "job.json").is_file():
            # Nothing is lost with an attempt that wrote no shard, such as one that stopped at a bad document.
            other = self.read_state().get("digest") != self.digest
            if other and any(self.output.glob("*.tar")) and not overwrite:
                if (self.output / MANIFEST_NAME).is_file():
                    # Another part has ended the job between these looks.
                    return self.is_finished(overwrite)
                raise DataError(
                    f"{self.output} holds an unfinished job with other inputs or options: choose another --output or pass --overwrite"
                )
        elif self.output.is_dir() and not self.work.is_dir() and (names := [path.name for path in self.output.iterdir()]):
            if self.work.is_dir() or (self.output / MANIFEST_NAME).is_file():
                # Another part has begun or ended it.
                return self.is_finished(overwrite)
            raise DataError(f"--output {self.output} holds other files ({min(names)}, ...): name an empty or new folder")
        return False

    def is_complete(self) -> bool:
        """Whether the manifest of exactly this job is there, with all its shards."""
        try:
            return self._wrote(Manifest.load(self.output))
        except ManifestError:
            return False

    def _wrote(self, found: Manifest) -> bool:
        if found.content["job"] != self.digest:
            return False
        for split in found.splits:
            found.check_sizes(split)
        return True

    def _is_published(self, overwrite: bool) -> bool:
        if overwrite:
            return False
        try:
            found = Manifest.load(self.output)
            if self._wrote(found):
                return True
        except ManifestError as error:
            raise DataError(f"--output {self.output} cannot be used, choose another or pass --overwrite: {error}") from error
        difference = _difference(found, self.identity)
        raise DataError(f"{self.output} holds the shards of another job ({difference}): choose another --output or pass --overwrite")

    def __enter__(self) -> Job:
        with disk_errors(self.output):
            self.work.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.work / "lock", "wb")
        if not take_lock(self.lock, fcntl.LOCK_EX):
            self.lock.close()
            raise DataError(self.busy())
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.close()

    def busy(self) -> str:
        """The message for who comes second."""
        return f"another tokenize is writing to {self.output}: wait for it or choose another --output"

    def state(self, versions: dict[str, str], unit_bytes: int) -> dict[str, Any]:
        """What decides whether journals may be used again."""
        modified = [mtime_ns for mtime_ns, _ in self.source_states]
        return {"digest": self.digest, "modified": modified, "versions": versions, "unit_bytes": unit_bytes}

    def read_state(self) -> dict[str, Any]:
        """The state of the job in progress; empty, so that nothing of it is used, when there is none or it cannot be read."""
        try:
            return json.loads((self.work / "job.json").read_bytes())
        except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
            return {}

    def prepare(self, versions: dict[str, str], unit_bytes: int) -> bool:
        """Sets up the work folder: keeps an earlier run's journals where they still hold, removes what does not belong to this job.

        Only files that this command wrote are removed: the manifest, the tokenizer, shards by their names, journals.
        Returns whether there is anything to do, which a whole job always has.
        """
        state, found = self.state(versions, unit_bytes), self.read_state()
        if found != state or (self.output / MANIFEST_NAME).exists():
            if found.get("digest") == self.digest:
                warn("an input, a library or --unit-bytes has changed since the interrupted run: starting over")
            (self.output / MANIFEST_NAME).unlink(missing_ok=True)
            (self.output / TOKENIZER_NAME).unlink(missing_ok=True)
            for split in SPLITS:
                for shard in self.output.glob(f"{split}-*.tar"):
                    shard.unlink()
            for folder in JOURNALS:
                shutil.rmtree(self.work / folder, ignore_errors=True)
        with disk_errors(self.output):
            for folder in JOURNALS:
                (self.work / folder).mkdir(exist_ok=True)
        write_atomically(self.work / "job.json", json.dumps(state).encode())
        for leftover in self.work.rglob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        return True

    def check_sources(self) -> None:
        """Raises DataError when an input is not what it was when the job began: the passes would have read different documents.

        The work done so far is given up, so that the same command can be run again.
        """
        for source, before in zip(self.sources, self.source_states, strict=True):
            try:
                changed = _state(source.path) != before
            except OSError:
                changed = True
            if changed:
                self.give_up(f"input {source.path} has changed while it was read")

    def give_up(self, problem: str) -> NoReturn:
        """Makes the next run start anew, because the journals are of no use. Raises DataError with the problem."""
        (self.work / "job.json").unlink(missing_ok=True)
        raise DataError(f"{problem}: run the same command again when nothing writes to the inputs any more")

    def finish(self) -> None:
        """Removes the work folder, after the manifest has been published."""
        shutil.rmtree(self.work)


def take_lock(file: BinaryIO, kind: int, wait: bool = False) -> bool:
    """Takes fcntl.LOCK_EX or LOCK_SH; False where another process is in the way. Raises DataError where there are no locks."""
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        problem = f"files cannot be locked in {Path(file.name).parent} ({error.strerror})"
        raise DataError(f"{problem}: choose an --output on a file system with locks (Lustre: mounted with flock)") from error
    return True


def _state(path: Path) -> tuple[int, int]:
    """Modification time in ns and size in bytes."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _printable(path: Path) -> str:
    """The file's name, without the bytes that no text can hold."""
    return os.fsencode(path.name).decode(errors="replace")


def _difference(found: Manifest, wanted: dict[str, Any]) -> str:
    """Names what distinguishes a finished output from the job that was asked for."""
    if found.tokenizer_sha256 != wanted["tokenizer"] or found.eod_id != wanted["eod_id"]:
        return "another tokenizer"
    if [{key: source[key] for key in ("name", "bytes", "fingerprint")} for source in found.content["sources"]] != wanted["sources"]:
        return "other inputs"
    changed = [key for key, value in wanted["options"].items() if found.content["options"].get(key) != value]
    return f"options: {', '.join(changed)}" if changed else "another format"
