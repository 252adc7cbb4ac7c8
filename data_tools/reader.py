"""What a trainer reads: a torch dataset over shards, the same global sequence for every layout, resumable by one integer.

The global order (order.py) does not know ranks. A global batch is the next `global_batch_size` samples of it; rank r
of D takes the r-th contiguous slice and cuts it into micro-batches. Worker w of n in a torch DataLoader
(`batch_size=None`) yields the micro-batches w, w + n, w + 2n, ..., which the loader's round robin puts in order
again. So the tokens that one optimizer step sees depend on neither D nor n, and the whole state of the data is
`consumed_samples`: what all ranks together have consumed.

    dataset = TokenDataset("shards", "train", sequence_length=2048, seed=0, micro_batch_size=4, global_batch_size=512,
                           data_parallel_rank=rank, data_parallel_size=world, consumed_samples=0)
    for batch in DataLoader(dataset, batch_size=None, num_workers=2):
        inputs, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data_tools.errors import DataError
from data_tools.order import SampleOrder
from data_tools.store import TokenStore

__all__ = ["TokenDataset", "TokenStore"]


class TokenDataset(IterableDataset):
    """Endless micro-batches of one data-parallel rank, over epochs.

    Yields {"tokens": int64 [micro_batch_size, sequence_length + 1], "sample_ids": int64 [micro_batch_size]}; the ids
    are indices of `TokenStore(directory, split, sequence_length)`.
    `window_shards`: shards whose samples are shuffled together; part of the order's definition.
    Raises ManifestError for shards that are missing or cut, DataError (a ValueError) for arithmetic that does not work out.
    """

    def __init__(
        self,
        directory: str | Path,
        split: str,
        sequence_length: int,
        seed: int,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        consumed_samples: int = 0,
        window_shards: int = 2,
    ) -> None:
        super().__init__()
        if micro_batch_size < 1 or global_batch_size < 1:
            raise DataError(f"micro_batch_size {micro_batch_size} and global_batch_size {global_batch_size} must be at least 1")
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DataError(f"data_parallel_rank {data_parallel_rank} must be at least 0 and below data_parallel_size {data_parallel_size}")
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise DataError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} * "
                f"data_parallel_size {data_parallel_size} = {micro_batch_size * data_parallel_size}"
            )
        if consumed_samples < 0 or consumed_samples % global_batch_size:
            raise DataError(f"consumed_samples {consumed_samples} is not a multiple of global_batch_size {global_batch_size}")
        self.store = TokenStore(directory, split, sequence_length)
        self.order = SampleOrder(self.store.samples_of_shard, seed, window_shards)
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.consumed_samples = consumed_samples

    @property
    def epoch_samples(self) -> int:
        """Samples in one pass over the split, all ranks together."""
        return self.order.epoch_samples

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        per_rank = self.global_batch_size // self.data_parallel_size
        micro_batches = per_rank // self.micro_batch_size
        while True:
            global_batch, micro_batch = divmod(index, micro_batches)
            slice_start = global_batch * self.global_batch_size + self.data_parallel_rank * per_rank
            yield self._read(self.consumed_samples + slice_start + micro_batch * self.micro_batch_size)
            index += step

    def _read(self, position: int) -> dict[str, torch.Tensor]:
        sample_ids = self.order.sample_ids(position, self.micro_batch_size)
        tokens = np.empty((self.micro_batch_size, self.store.sequence_length + 1), dtype=np.int64)
        for row, sample in zip(tokens, sample_ids.tolist(), strict=True):
            self.store.read_into(sample, row)
        # The ids are a view of the window's order, which must not be reachable from outside.
        return {"tokens": torch.from_numpy(tokens), "sample_ids": torch.from_numpy(sample_ids.copy())}
