"""What is in a shards folder, as text: documents as they were tokenized, or samples as the trainer gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.errors import DataError, ManifestError
from data_tools.files import sha256_file
from data_tools.manifest import TOKENIZER_NAME, Manifest
from data_tools.store import TokenStore


@dataclass(frozen=True)
class Item:
    """A document or a sample, decoded."""

    title: str
    text: str


def documents_as_text(directory: Path, split: str, start: int, count: int) -> Iterator[Item]:
    """Documents [start, start + count) of a split, in their written order, without the end-of-document token."""
    store = TokenStore(directory, split, sequence_length=1)
    decode = _decoder(store.manifest)
    total = store.manifest.documents(split)
    if start >= total:
        raise DataError(f"{directory}: --start {start}, but split {split!r} holds {total} documents")
    before = 0
    for index, shard in enumerate(store.shards):
        if before + shard.documents > start and before < start + count:
            lengths = store.document_lengths(index).astype(np.int64)
            ends = np.cumsum(lengths)
            for document in range(max(start - before, 0), min(start + count - before, shard.documents)):
                tokens = np.empty(lengths[document], dtype=np.int64)
                store.read_tokens(index, int(ends[document] - lengths[document]), tokens)
                yield Item(f"{split} document {before + document} of {total}, {shard.name}, {len(tokens)} tokens", decode(tokens[:-1]))
        before += shard.documents


def samples_as_text(directory: Path, split: str, sequence_length: int, start: int, count: int) -> Iterator[Item]:
    """Samples [start, start + count) of a split, the end-of-document token shown by its name."""
    store = TokenStore(directory, split, sequence_length)
    decode = _decoder(store.manifest)
    if start >= len(store):
        raise DataError(
            f"{directory}: --start {start}, but split {split!r} holds {len(store)} samples of sequence length {sequence_length}"
        )
    for index in range(start, min(start + count, len(store))):
        yield Item(f"{split} sample {index} of {len(store)}, {sequence_length} + 1 tokens", decode(store[index]))


def _decoder(manifest: Manifest) -> Callable[[np.ndarray], str]:
    """Ids to text with the tokenizer that lies beside the shards. Raises ManifestError when it is not the one they were made with."""
    from tokenizers import Tokenizer

    path = manifest.directory / TOKENIZER_NAME
    if not path.is_file() or sha256_file(path) != manifest.tokenizer_sha256:
        raise ManifestError(f"{path} is missing or not the one of these shards: run `python -m data_tools verify {manifest.directory}`")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda tokens: tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
