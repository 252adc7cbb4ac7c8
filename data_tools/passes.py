"""The two passes over the documents, unit by unit, as functions that worker processes run.

Both leave their result in a file that appears only when it is complete, so a restart skips finished units; what a
unit's files hold depends on the unit alone.

    hash/000012.npz     digests uint64 [num_documents, 2]: the first 128 bits of SHA-256 of each text (0 for rejected ones)
                        reasons uint8 [num_documents]: 0 or a documents.Reason;  text_bytes: UTF-8 bytes of all texts
    tokens/000012.npz   for each split the documents' lengths in tokens, uint32 [num_documents]
    tokens/000012.SPLIT their tokens, one after the other
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.backends import BACKENDS
from data_tools.documents import Reason, Rejected, Unit, describe, read_unit
from data_tools.errors import DataError
from data_tools.files import AtomicFile, write_atomically
from data_tools.manifest import SPLITS
from data_tools.tokenizer import TokenizerFile

DROPPED = 255


@dataclass(frozen=True)
class HashTask:
    """Hash the documents of a unit into `path`."""

    unit: Unit
    path: Path
    text_field: str
    on_invalid: str


@dataclass(frozen=True)
class TokenizeTask:
    """Tokenize a unit's documents into `folder`/`name`.*, `plan` uint8 [num_documents] telling the split of each or DROPPED."""

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
    if task.path.is_file():
        return task.unit.input_bytes
    digests, reasons = [], bytearray()
    text_bytes = 0
    for text in read_unit(task.unit, task.text_field):
        if isinstance(text, Rejected):
            if task.on_invalid == "error":
                raise DataError(describe(text, task.unit, task.text_field))
            digests.append(bytes(16))
            reasons.append(text.reason)
        elif not text or text.isspace():
            digests.append(bytes(16))
            reasons.append(Reason.EMPTY)
        else:
            content = text.encode()
            text_bytes += len(content)
            digests.append(hashlib.sha256(content).digest()[:16])
            reasons.append(0)
    buffer = io.BytesIO()
    table = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)
    np.savez(buffer, digests=table, reasons=np.frombuffer(reasons, dtype=np.uint8), text_bytes=np.int64(text_bytes))
    write_atomically(task.path, buffer.getbuffer())
    return task.unit.input_bytes


def tokenize_unit(task: TokenizeTask) -> int:
    """Second pass. Returns the unit's bytes on disk. Raises DataError when the input is not what the hash pass read."""
    done = task.folder / f"{task.name}.npz"
    if done.is_file():
        return task.unit.input_bytes
    encoder = BACKENDS[task.backend].load(task.tokenizer)
    dtype = np.dtype(task.dtype).newbyteorder("<")
    eod_id = task.tokenizer.eod_id
    end = np.array([eod_id], dtype=dtype).tobytes()
    files = [AtomicFile(task.folder / f"{task.name}.{split}", durable=False) for split in SPLITS]
    lens: list[list[int]] = [[] for _ in SPLITS]
    try:
        number = -1
        for number, text in enumerate(read_unit(task.unit, task.text_field)):
            split = task.plan[number] if number < len(task.plan) else DROPPED
            if split == DROPPED:
                continue
            ids = encoder.encode(text)
            if (ids == eod_id).any():
                raise DataError(
                    f"{task.unit.source.path}: plain text was encoded as the end-of-document token {task.tokenizer.eod_token!r}; "
                    "name a token with --eod-token that text cannot produce"
                )
            files[split].write(ids.astype(dtype).data)
            files[split].write(end)
            lens[split].append(len(ids) + 1)
        if number + 1 != len(task.plan):
            raise DataError(f"{task.unit.source.path} changed while it was being read: run the same command again")
        for file in files:
            file.commit()
    finally:
        for file in files:
            file.discard()
    buffer = io.BytesIO()
    np.savez(buffer, **{split: np.array(lens[index], dtype=np.uint32) for index, split in enumerate(SPLITS)})
    write_atomically(done, buffer.getbuffer())
    return task.unit.input_bytes
