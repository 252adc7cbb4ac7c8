"""The global sample order: a pure function of (samples per shard, seed, epoch, window size).

An epoch visits each sample of a split once. Its shards are permuted and grouped into windows of W; the samples of a
window are permuted together. So a reader needs at most W shards at a time (two while it crosses from one window to
the next), and still mixes W shards' worth of samples.

Permutations come from Philox, a counter-based generator: a window's order is computed from (seed, epoch, window)
alone, without what came before it. Its raw 64-bit output is sorted, because NumPy guarantees the raw stream across
versions and not `Generator.permutation`.
"""

from __future__ import annotations

import numpy as np

from data_tools.errors import DataError


class SampleOrder:
    """Maps global positions 0, 1, 2, ... (endless, over epochs) to sample ids.

    `samples_of_shard` [num_shards] int64; sample ids count the samples shard by shard, as TokenStore does.
    """

    def __init__(self, samples_of_shard: np.ndarray, seed: int, window_shards: int) -> None:
        if not 0 <= seed < 2**63:
            raise DataError(f"seed is {seed}: it must be between 0 and 2^63 - 1")
        if window_shards < 1:
            raise DataError(f"window_shards is {window_shards}: it must be at least 1")
        self.samples_of_shard = samples_of_shard
        self.first_sample = np.concatenate(([0], np.cumsum(samples_of_shard)))
        self.seed = seed
        self.window_shards = window_shards
        self.epoch_samples = int(self.first_sample[-1])
        self._epoch = -1
        self._window = -1

    def sample_ids(self, start: int, count: int) -> np.ndarray:
        """Ids of the samples at the global positions [start, start + count): int64 [count]."""
        pieces = []
        while count:
            epoch, position = divmod(start, self.epoch_samples)
            self._load(epoch, position)
            offset = position - self._window_ends[self._window] + len(self._ids)
            piece = self._ids[offset : offset + count]
            pieces.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(pieces) if len(pieces) != 1 else pieces[0]

    def _load(self, epoch: int, position: int) -> None:
        """Makes the window current that holds `position` of `epoch`."""
        if epoch != self._epoch:
            shards = self._permutation(len(self.samples_of_shard), epoch, 0)
            self._windows = [shards[first : first + self.window_shards] for first in range(0, len(shards), self.window_shards)]
            self._window_ends = np.cumsum([self.samples_of_shard[window].sum() for window in self._windows]).tolist()
            self._epoch, self._window = epoch, -1
        if self._window >= 0 and self._window_ends[self._window] - len(self._ids) <= position < self._window_ends[self._window]:
            return
        self._window = int(np.searchsorted(self._window_ends, position, "right"))
        ids = np.concatenate([np.arange(self.first_sample[shard], self.first_sample[shard + 1]) for shard in self._windows[self._window]])
        self._ids = ids[self._permutation(len(ids), epoch, self._window + 1)]

    def _permutation(self, size: int, epoch: int, stream: int) -> np.ndarray:
        key = np.array([self.seed, (epoch << 32) + stream], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")
