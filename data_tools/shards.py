"""Writing token streams as shards: uncompressed USTAR archives of blocks, which webdataset reads.

A shard is a tar file whose samples are blocks of about a Mi tokens of whole documents:

    train-000000-00000.tokens.u16   the documents' tokens one after the other, each ended by the end-of-document id
    train-000000-00000.lens.u32     the documents' lengths in tokens, that id included

Because the archive is not compressed and members start at multiples of 512 bytes, the same file is a memory map with
random access as well: the manifest keeps the offsets. Block and shard boundaries depend on nothing but the
sequence of document lengths, so the bytes are the same however the work was divided.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_tools.files import AtomicFile, write_atomically
from data_tools.manifest import Shard, block_members, shard_entry

BLOCK_TOKENS = 1 << 20
SHARD_TOKENS = 256 << 20


class ShardWriter:
    """Writes one split's shards into `output`, skipping those that an earlier run has published.

    `add(tokens, lens)` takes documents in order; `finish()` closes the last shard and returns all of them.
    `journal` holds one small file for each published shard. `on_published` is called after each.
    """

    def __init__(
        self,
        output: Path,
        journal: Path,
        split: str,
        dtype: str,
        block_tokens: int = BLOCK_TOKENS,
        shard_tokens: int = SHARD_TOKENS,
        on_published: Callable[[], None] = lambda: None,
    ) -> None:
        self.output = output
        self.journal = journal
        self.split = split
        self.dtype = dtype
        self.block_tokens = block_tokens
        self.shard_tokens = shard_tokens
        self.on_published = on_published
        self.shards: list[Shard] = []
        self.pending_tokens: list[np.ndarray] = []
        self.pending_lens: list[np.ndarray] = []
        self.pending = 0
        self._begin_shard()

    def _begin_shard(self) -> None:
        self.name = f"{self.split}-{len(self.shards):06d}.tar"
        self.published = self._read_journal()
        self.archive: Archive | None = None
        self.shard_filled = 0

    def _read_journal(self) -> Shard | None:
        path = self.journal / f"{self.name}.json"
        if not path.is_file() or not (self.output / self.name).is_file():
            return None
        shard = Shard(**json.loads(path.read_bytes()))
        return shard if (self.output / self.name).stat().st_size == shard.size else None

    def add(self, tokens: Callable[[int, int], np.ndarray], lens: np.ndarray) -> None:
        """Appends documents. `lens` [num_documents]: their lengths; `tokens(start, stop)` reads a range of their tokens.

        Tokens are asked for only where a shard has to be written: those of published shards may be gone.
        """
        ends = np.cumsum(lens, dtype=np.int64)
        first = position = 0
        while first < len(lens):
            # A block ends with the document that fills it.
            last = int(np.searchsorted(ends, position + self.block_tokens - self.pending)) + 1
            if last > len(lens):
                self._hold(tokens, position, int(ends[-1]), lens[first:], copy=True)
                return
            stop = int(ends[last - 1])
            self._hold(tokens, position, stop, lens[first:last], copy=False)
            self._close_block()
            first, position = last, stop

    def _hold(self, tokens: Callable[[int, int], np.ndarray], start: int, stop: int, lens: np.ndarray, copy: bool) -> None:
        self.pending += stop - start
        if self.published is None:
            piece = tokens(start, stop)
            # A copy lets the caller delete the file behind `tokens`.
            self.pending_tokens.append(piece.copy() if copy else piece)
            self.pending_lens.append(lens)

    def _close_block(self) -> None:
        self.shard_filled += self.pending
        if self.published is None:
            if self.archive is None:
                self.archive = Archive(self.output / self.name, self.journal, self.split, self.dtype)
            self.archive.write_block(self.pending_tokens, self.pending_lens)
        self.pending_tokens, self.pending_lens, self.pending = [], [], 0
        if self.shard_filled >= self.shard_tokens:
            self._close_shard()

    def _close_shard(self) -> None:
        shard = self.published
        if shard is None:
            shard = self.archive.close()
            write_atomically(self.journal / f"{self.name}.json", json.dumps(shard_entry(shard)).encode())
        self.shards.append(shard)
        self._begin_shard()
        self.on_published()

    def finish(self) -> list[Shard]:
        """Writes what is left and returns every shard, in order."""
        if self.pending:
            self._close_block()
        if self.shard_filled:
            self._close_shard()
        return self.shards

    def abandon(self) -> None:
        """Removes the unfinished shard; published ones stay."""
        if self.archive is not None:
            self.archive.file.discard()


class Archive:
    """One tar file being written: hashed on the way, invisible until it is complete."""

    def __init__(self, path: Path, staging: Path, split: str, dtype: str) -> None:
        self.split = split
        self.dtype = dtype
        self.file = AtomicFile(path, staging)
        self.sha256 = hashlib.sha256()
        self.offset = 0
        self.blocks: list[tuple[int, int, int, int]] = []

    def write_block(self, tokens: list[np.ndarray], lens: list[np.ndarray]) -> None:
        """Appends a block: its tokens and its document lengths, each in pieces."""
        tokens_name, lens_name = block_members(self.file.path.name, len(self.blocks), self.dtype)
        tokens_offset = self._write_member(tokens_name, tokens, np.dtype(self.dtype).newbyteorder("<"))
        lens_offset = self._write_member(lens_name, lens, np.dtype("<u4"))
        self.blocks.append((tokens_offset, sum(map(len, tokens)), lens_offset, sum(map(len, lens))))

    def _write_member(self, name: str, pieces: list[np.ndarray], dtype: np.dtype) -> int:
        header = tarfile.TarInfo(name)
        header.size = sum(map(len, pieces)) * dtype.itemsize
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        start = self.offset
        for piece in pieces:
            self._write(memoryview(np.ascontiguousarray(piece, dtype)).cast("B"))
        self._write(bytes(-self.offset % tarfile.BLOCKSIZE))
        return start

    def _write(self, content: bytes | memoryview) -> None:
        self.file.write(content)
        self.sha256.update(content)
        self.offset += len(content)

    def close(self) -> Shard:
        """Ends the archive and publishes it."""
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.offset + end) % tarfile.RECORDSIZE))
        self.file.commit()
        documents, tokens = sum(block[3] for block in self.blocks), sum(block[1] for block in self.blocks)
        return Shard(self.file.path.name, self.split, self.offset, self.sha256.hexdigest(), documents, tokens, tuple(self.blocks))
