"""From the digests of all documents to a plan: which are kept, and in which split.

Exact and global: of documents with the same digest the first in input order stays (XXH3, 128 bits: among a billion
documents the chance that any two different ones share it is below 1e-20). The digests are sorted in partitions by their
leading bits, so memory is bounded by one partition (about 2 GB) plus one byte a document. The split of a document is
decided by other bits of its digest: it does not change when files are added, renamed or reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np

from data_tools.documents import Reason
from data_tools.manifest import SPLITS
from data_tools.passes import DROPPED, read_journal

PARTITION_DOCUMENTS = 1 << 25


@dataclass
class Plan:
    """What happens to each document."""

    units: list[np.ndarray]
    """For each unit uint8 [num_documents]: index into SPLITS, or DROPPED."""
    counts: list[dict[str, int]]
    """For each part of all units: documents read, text_bytes, kept, and how many were dropped for which reason."""


def plan_documents(paths: list[Path], validation_fraction: Decimal, partition_documents: int = PARTITION_DOCUMENTS) -> Plan:
    """Reads the journals of the hash pass, in input order, and decides about each document."""
    journals = [{name: array for name, array in read_journal(path).items() if name != "digests"} for path in paths]
    starts = np.concatenate(([0], np.cumsum([len(journal["reasons"]) for journal in journals]))).astype(np.int64)
    everything = np.concatenate([journal["reasons"] for journal in journals]) if journals else np.zeros(0, np.uint8)
    plan = np.full(len(everything), DROPPED, dtype=np.uint8)
    limit = np.uint64(min(int(validation_fraction * 2**64), 2**64 - 1))
    partitions = max(1, 1 << (max(len(everything) - 1, 0) // partition_documents).bit_length())
    for partition in range(partitions):
        documents, digests = _partition(paths, starts, everything, partition, partitions)
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
        # The sort is stable, so the first of equal digests is the first in input order.
        duplicates = documents[order[1:][same]]
        everything[duplicates] = Reason.DUPLICATE
        plan[documents] = np.where(digests[:, 1] < limit, SPLITS.index("validation"), SPLITS.index("train"))
        plan[duplicates] = DROPPED
    units = [plan[start:stop] for start, stop in zip(starts[:-1], starts[1:], strict=True)]
    counts = []
    start = 0
    for journal in journals:
        for documents, text_bytes in zip(journal["documents"].tolist(), journal["text_bytes"].tolist(), strict=True):
            histogram = np.bincount(everything[start : start + documents], minlength=max(Reason) + 1).tolist()
            dropped = {reason.name.lower(): histogram[reason] for reason in Reason}
            counts.append({"documents": documents, "text_bytes": text_bytes, "kept": histogram[0], **dropped})
            start += documents
    return Plan(units, counts)


def _partition(
    paths: list[Path], starts: np.ndarray, reasons: np.ndarray, partition: int, partitions: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions int64 [n] and digests uint64 [n, 2] of the usable documents whose leading bits name the partition."""
    documents, digests = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.uint64)]
    shift = np.uint64(64 - (partitions.bit_length() - 1))
    for path, start in zip(paths, starts[:-1], strict=True):
        table = read_journal(path)["digests"]
        usable = reasons[start : start + len(table)] == 0
        if partitions > 1:
            usable &= (table[:, 0] >> shift) == partition
        documents.append(np.flatnonzero(usable) + start)
        digests.append(table[usable])
    return np.concatenate(documents), np.concatenate(digests)
