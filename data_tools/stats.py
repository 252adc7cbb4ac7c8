"""A corpus in numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_tools.manifest import Manifest
from data_tools.progress import Progress, format_count
from data_tools.store import TokenStore

CHUNK_TOKENS = 1 << 22


def token_counts(directory: str | Path, split: str) -> np.ndarray:
    """How often each id occurs in a split: int64 [vocab_size]. Reads the whole split."""
    store = TokenStore(directory, split, sequence_length=1)
    counts = np.zeros(store.manifest.vocab_size, dtype=np.int64)
    buffer = np.empty(CHUNK_TOKENS, dtype=np.int64)
    with Progress(f"count {split}", store.manifest.tokens(split), "tokens") as progress:
        for index, shard in enumerate(store.shards):
            for start in range(0, shard.tokens, CHUNK_TOKENS):
                chunk = buffer[: min(CHUNK_TOKENS, shard.tokens - start)]
                store.read_tokens(index, start, chunk)
                counts += np.bincount(chunk, minlength=len(counts))
                progress.update(len(chunk))
    return counts


def unigram_entropy(directory: str | Path, split: str) -> float:
    """Entropy in nats per token of a split's own token frequencies.

    It is the loss of the best model that ignores context and has seen the split itself: a strict yardstick for a
    validation loss. Raises ManifestError for shards that are missing or cut.
    """
    return entropy(token_counts(directory, split))


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution `counts` [n] / sum."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


def collect(directory: str | Path) -> dict[str, Any]:
    """Everything that `python -m data_tools stats --json` prints."""
    manifest = Manifest.load(directory)
    filters = manifest.content["filters"]
    splits = {}
    for split in manifest.splits:
        store = TokenStore(directory, split, sequence_length=1)
        lengths = np.concatenate([store.document_lengths(index) for index in range(len(store.shards))])
        counts = token_counts(directory, split)
        splits[split] = {
            "shards": len(store.shards),
            "bytes": sum(shard.size for shard in store.shards),
            "documents": manifest.documents(split),
            "tokens": manifest.tokens(split),
            "tokens_per_document": {
                "mean": float(lengths.mean()),
                **{
                    name: int(np.quantile(lengths, q, method="lower"))
                    for name, q in (("min", 0), ("median", 0.5), ("p95", 0.95), ("max", 1))
                },
            },
            "vocabulary_used": int((counts > 0).sum()),
            "unigram_entropy_nats": entropy(counts),
        }
    return {
        "manifest_digest": manifest.digest,
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "backend": manifest.content["backend"]["name"],
        "filters": filters,
        "splits": splits,
    }


def as_table(stats: dict[str, Any]) -> str:
    """`collect`'s result for people: one column a split."""
    splits = stats["splits"]
    rows = [["", *splits]]
    for field in ("shards", "documents"):
        rows.append([field, *(f"{split[field]:,}" for split in splits.values())])
    rows.append(["bytes", *(format_count(split["bytes"], "B") for split in splits.values())])
    rows.append(["tokens", *(f"{split['tokens']:,}" for split in splits.values())])
    for name in ("mean", "min", "median", "p95", "max"):
        rows.append([f"tokens per document, {name}", *(f"{split['tokens_per_document'][name]:,.0f}" for split in splits.values())])
    rows.append([f"vocabulary used of {stats['vocab_size']:,}", *(f"{split['vocabulary_used']:,}" for split in splits.values())])
    rows.append(["unigram entropy, nats per token", *(f"{split['unigram_entropy_nats']:.4f}" for split in splits.values())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    ]
    filters = ", ".join(f"{count:,} {name}" for name, count in stats["filters"].items())
    return "\n".join([*lines, "", f"read: {filters}", f"{stats['dtype']}, {stats['backend']}, manifest {stats['manifest_digest'][:16]}"])
