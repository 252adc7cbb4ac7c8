"""The two passes over the documents, unit by unit, as functions that worker processes run.

Both leave their result in a file that appears only when it is complete, so a restart skips finished units; what a
unit's files hold depends on the unit alone. They are not flushed to the device: a file that the machine lost when it
went down is noticed and made again.

    hash/000012.npz     digests uint64 [num_documents, 2]: XXH3-128 of each text (0 for rejected ones)
                        reasons uint8 [num_documents]: 0 or a documents.Reason
                        documents, text_bytes int64 [num_parts]: documents, and UTF-8 bytes of the texts, of each part
    tokens/000012.npz   for each split the documents' lengths in tokens, uint32 [num_documents], and the stem of the token files
    tokens/STEM.SPLIT   their tokens, one after the other

Machines that share the folder may do the same unit at the same time. Then the journal of one of them stays, and the token
files that it names are nobody else's: they are written once, whoever reads them.
"""

from __future__ import annotations

import errno
import io
import itertools
import secrets
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data_tools.backends import BACKENDS, panics_as
from data_tools.documents import Reason, Rejected, Unit, describe, read_part
from data_tools.errors import DataError, InputChanged
from data_tools.files import AtomicFile
from data_tools.manifest import SPLITS
from data_tools.tokenizer import TokenizerFile

DROPPED = 255
NO_DIGEST = bytes(16)
BUFFER_TOKENS = 1 << 19


@dataclass(frozen=True)
class HashTask:
    """Hash the documents of a unit into `path`."""

    unit: Unit
    path: Path
    text_field: str
    on_invalid: str


@dataclass(frozen=True)
class TokenizeTask:
    """Tokenize a unit's documents, journal `folder`/`name`.npz, `plan` uint8 [num_documents] telling the split of each or DROPPED."""

    unit: Unit
    folder: Path
    name: str
    text_field: str
    plan: np.ndarray
    tokenizer: TokenizerFile
    backend: str
    dtype: str


def hash_unit(task: HashTask) -> int:
    """First pass. Returns the unit's bytes on disk, for progress. Raises DataError for a rejected document unless `skip`."""
    if read_journal(task.path) is not None:
        return task.unit.input_bytes
    digests, reasons = [], bytearray()
    documents, text_bytes = [], []
    for part in task.unit.parts:
        first, size = len(reasons), 0
        for text in read_part(part, task.text_field):
            if isinstance(text, Rejected):
                if task.on_invalid == "error":
                    raise DataError(describe(text, part, task.text_field))
                digests.append(NO_DIGEST)
                reasons.append(text.reason)
            elif not text or text.isspace():
                digests.append(NO_DIGEST)
                reasons.append(Reason.EMPTY)
            else:
                content = text.encode()
                size += len(content)
                digests.append(xxhash.xxh3_128_digest(content))
                reasons.append(0)
        documents.append(len(reasons) - first)
        text_bytes.append(size)
    table = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    _write_journal(
        task.path,
        digests=table,
        reasons=np.frombuffer(reasons, dtype=np.uint8),
        documents=np.array(documents, dtype=np.int64),
        text_bytes=np.array(text_bytes, dtype=np.int64),
    )
    return task.unit.input_bytes


def tokenize_unit(task: TokenizeTask) -> int:
    """Second pass. Returns the unit's bytes on disk. Raises InputChanged when it does not find the hash pass's documents."""
    done = task.folder / f"{task.name}.npz"
    if read_journal(done) is not None:
        return task.unit.input_bytes
    encoder = BACKENDS[task.backend].load(task.tokenizer)
    stem = f"{task.name}.{secrets.token_hex(4)}"
    files = [TokenFile(task.folder / f"{stem}.{split}", task.dtype, task.tokenizer) for split in SPLITS]
    try:
        texts = (text for part in task.unit.parts for text in read_part(part, task.text_field))
        with panics_as(DataError, task.backend, "; pass another --backend"):
            for text, split in itertools.zip_longest(texts, task.plan.tolist()):
                if text is None or split is None or (split != DROPPED and isinstance(text, Rejected)):
                    names = ", ".join(dict.fromkeys(str(part.source.path) for part in task.unit.parts))
                    raise InputChanged(f"input {names} has changed between the two passes over it")
                if split != DROPPED:
                    files[split].append(encoder.encode(text))
        if read_journal(done) is not None:
            return task.unit.input_bytes
        for file in files:
            file.commit()
    finally:
        for file in files:
            file.discard()
    lens = {split: np.array(file.lens, dtype=np.uint32) for split, file in zip(SPLITS, files, strict=True)}
    _write_journal(done, stem=np.array(stem), **lens)
    return task.unit.input_bytes


class TokenFile:
    """Tokens of documents on their way to a file, through a buffer that is used again and again."""

    def __init__(self, path: Path, dtype: str, tokenizer: TokenizerFile) -> None:
        self.file = AtomicFile(path, durable=False)
        self.tokenizer = tokenizer
        self.buffer = np.empty(BUFFER_TOKENS, np.dtype(dtype).newbyteorder("<"))
        self.filled = 0
        self.lens: list[int] = []
        self.flushed_documents = 0
        self.discard = self.file.discard

    def append(self, ids: np.ndarray) -> None:
        """Adds a document, ids uint32 [num_tokens], and the token that ends it."""
        length = len(ids) + 1
        if self.filled + length > len(self.buffer):
            self._flush()
            if length > len(self.buffer):
                self.buffer = np.empty(length, self.buffer.dtype)
        self.buffer[self.filled : self.filled + length - 1] = ids
        self.filled += length
        self.buffer[self.filled - 1] = self.tokenizer.eod_id
        self.lens.append(length)

    def _flush(self) -> None:
        tokens = self.buffer[: self.filled]
        if np.count_nonzero(tokens == self.tokenizer.eod_id) != len(self.lens) - self.flushed_documents:
            problem = f"plain text was encoded as the end-of-document token {self.tokenizer.eod_token!r}"
            raise DataError(f"{self.tokenizer.path}: {problem}; name a token with --eod-token that text cannot produce")
        self.file.write(tokens.data)
        self.filled, self.flushed_documents = 0, len(self.lens)

    def commit(self) -> None:
        """Writes what is left and gives the file its name."""
        self._flush()
        self.file.commit()


def read_journal(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a unit's journal; None when it is not there, or was lost with the machine and has to be made again."""
    try:
        with np.load(path) as journal:
            return dict(journal)
    except (FileNotFoundError, EOFError, ValueError, zipfile.BadZipFile):
        return None
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        # NFS: another machine has put the same journal in its place while it was read.
        return read_journal(path)


def _write_journal(path: Path, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    with AtomicFile(path, durable=False) as file:
        file.write(buffer.getbuffer())
