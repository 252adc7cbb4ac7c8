"""Random access to the tokens of a split, through memory maps of its shards.

A shard is one logical stream of tokens: its blocks joined in order. Sample i of a shard is the tokens
[i * S, i * S + S + 1) of that stream, S the sequence length: neighbours share one token, so that inputs
`sample[:-1]` and targets `sample[1:]` cover each token once. What does not fill a sample at the end of a shard is
dropped (less than S tokens of normally 256 Mi).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import numpy as np

from data_tools.errors import DataError
from data_tools.manifest import Manifest

MAX_OPEN_SHARDS = 16


class TokenStore:
    """Map-style access: `store[i]` is sample i of the split, int64 [sequence_length + 1].

    The sizes of all shards are checked on opening. Raises ManifestError (missing or cut shards, unknown split) and
    DataError (the split does not hold one sample).
    """

    def __init__(self, directory: str | Path, split: str, sequence_length: int) -> None:
        if sequence_length < 1:
            raise DataError(f"sequence_length is {sequence_length}: it must be at least 1 token")
        self.manifest = Manifest.load(directory)
        self.split = split
        self.sequence_length = sequence_length
        self.shards = self.manifest.shards_of(split)
        self.manifest.check_sizes(split)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.samples_of_shard = np.array([max(shard.tokens - 1, 0) // sequence_length for shard in self.shards], dtype=np.int64)
        self.first_sample = np.concatenate(([0], np.cumsum(self.samples_of_shard)))
        if len(self) == 0:
            longest = max(shard.tokens for shard in self.shards)
            raise DataError(
                f"{directory}: split {split!r} holds no sample of sequence_length {sequence_length} + 1 tokens "
                f"(largest shard: {longest} tokens): lower the sequence length or tokenize more text"
            )
        self._maps: OrderedDict[int, tuple[np.ndarray, list[int], list[int]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self.first_sample[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        out = np.empty(self.sequence_length + 1, dtype=np.int64)
        self.read_into(index, out)
        return out

    def read_into(self, index: int, out: np.ndarray) -> None:
        """Copies sample `index` into `out`, int64 [sequence_length + 1]."""
        shard = int(self.first_sample.searchsorted(index, "right")) - 1
        start = (index - int(self.first_sample[shard])) * self.sequence_length
        self.read_tokens(shard, start, out)

    def read_tokens(self, shard: int, start: int, out: np.ndarray) -> None:
        """Copies the tokens [start, start + len(out)) of a shard's stream into `out`, any integer dtype."""
        data, block_starts, block_items = self._map(shard)
        block = bisect_right(block_starts, start) - 1
        filled = 0
        while filled < len(out):
            offset = start + filled - block_starts[block]
            count = min(len(out) - filled, block_starts[block + 1] - block_starts[block] - offset)
            item = block_items[block] + offset
            out[filled : filled + count] = data[item : item + count]
            filled += count
            block += 1

    def document_lengths(self, shard: int) -> np.ndarray:
        """Lengths in tokens of a shard's documents, end-of-document token included: uint32 [num_documents]."""
        data = np.memmap(self.manifest.directory / self.shards[shard].name, dtype="<u4", mode="r")
        return np.concatenate([data[offset // 4 : offset // 4 + count] for _, _, offset, count in self.shards[shard].blocks])

    def _map(self, shard: int) -> tuple[np.ndarray, list[int], list[int]]:
        """The shard as one array of tokens, the position of each block in the stream (and the end), and in the array."""
        found = self._maps.get(shard)
        if found is not None:
            self._maps.move_to_end(shard)
            return found
        entry = self.shards[shard]
        starts = np.concatenate(([0], np.cumsum([block[1] for block in entry.blocks]))).tolist()
        items = [block[0] // self.dtype.itemsize for block in entry.blocks]
        # Members start at multiples of 512 bytes, so the whole archive can be viewed as tokens.
        found = self._maps[shard] = (np.asarray(np.memmap(self.manifest.directory / entry.name, dtype=self.dtype, mode="r")), starts, items)
        if len(self._maps) > MAX_OPEN_SHARDS:
            self._maps.popitem(last=False)
        return found

    def __getstate__(self) -> dict:
        """Memory maps are opened again where the store is sent (a DataLoader's worker), not copied."""
        return {**self.__dict__, "_maps": OrderedDict()}
