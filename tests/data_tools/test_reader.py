"""The reader: one global sequence for every data-parallel size, worker count and restart."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from data_tools import store as store_module
from data_tools.errors import DataError, ManifestError
from data_tools.order import SampleOrder
from data_tools.reader import TokenDataset, TokenStore
from tests.data_tools.helpers import documents_of

SEQUENCE_LENGTH = 64
GLOBAL_BATCH_SIZE = 16
PINNED_ORDER = [0, 5, 6, 4, 2, 1, 3, 7, 8, 1, 5, 4, 2, 0, 6, 3, 8, 7]


def dataset(shards: Path, **changes: object) -> TokenDataset:
    values = {"sequence_length": SEQUENCE_LENGTH, "seed": 7, "micro_batch_size": 2, "global_batch_size": GLOBAL_BATCH_SIZE}
    return TokenDataset(shards, "train", **{**values, **changes})


def global_batches(shards: Path, size: int, workers: int, start: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and sample ids of `count` global batches from batch `start` on, joined over `size` ranks."""
    per_rank = GLOBAL_BATCH_SIZE // size // 2
    joined = []
    loaders = []
    for rank in range(size):
        data = dataset(shards, data_parallel_rank=rank, data_parallel_size=size, consumed_samples=start * GLOBAL_BATCH_SIZE)
        loaders.append(iter(DataLoader(data, batch_size=None, num_workers=workers)))
    for _ in range(count):
        parts = [batch for loader in loaders for batch in itertools.islice(loader, per_rank)]
        joined.append((torch.cat([part["tokens"] for part in parts]), torch.cat([part["sample_ids"] for part in parts])))
    return joined


def digest(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    content = hashlib.sha256()
    for tokens, ids in batches:
        assert tokens.dtype == ids.dtype == torch.int64
        assert tokens.shape == (GLOBAL_BATCH_SIZE, SEQUENCE_LENGTH + 1)
        content.update(tokens.numpy().tobytes() + ids.numpy().tobytes())
    return content.hexdigest()


@pytest.fixture(scope="module")
def num_batches(shards: Path) -> int:
    """Enough global batches to cross an epoch."""
    return dataset(shards).epoch_samples // GLOBAL_BATCH_SIZE + 4


@pytest.fixture(scope="module")
def reference(shards: Path, num_batches: int) -> str:
    return digest(global_batches(shards, 1, 0, 0, num_batches))


@pytest.mark.parametrize(("size", "workers"), [(2, 0), (4, 0), (1, 2), (2, 2), (4, 2)])
def test_one_sequence_for_every_layout(shards: Path, num_batches: int, reference: str, size: int, workers: int) -> None:
    assert digest(global_batches(shards, size, workers, 0, num_batches)) == reference


def test_restart_in_the_middle_of_an_epoch_with_other_sizes(shards: Path, num_batches: int, reference: str) -> None:
    first, second = num_batches // 3, num_batches // 3 + 5
    batches = global_batches(shards, 4, 0, 0, first)
    batches += global_batches(shards, 1, 2, first, second - first)
    batches += global_batches(shards, 2, 0, second, num_batches - second)
    assert digest(batches) == reference


def test_an_epoch_has_each_sample_once_and_the_next_another_order(shards: Path, num_batches: int) -> None:
    size = dataset(shards).epoch_samples
    assert size == len(TokenStore(shards, "train", SEQUENCE_LENGTH))
    ids = torch.cat([ids for _, ids in global_batches(shards, 1, 0, 0, 2 * num_batches)])
    first, second = ids[:size], ids[size : 2 * size]
    assert torch.equal(first.sort().values, torch.arange(size))
    assert torch.equal(second.sort().values, torch.arange(size))
    assert not torch.equal(first, second)
    other_seed = next(iter(dataset(shards, seed=8)))["sample_ids"]
    assert not torch.equal(other_seed, ids[:2])


def test_samples_are_the_documents_in_order(shards: Path) -> None:
    store = TokenStore(shards, "train", SEQUENCE_LENGTH)
    documents = iter(documents_of(shards, "train"))
    index = 0
    for shard in store.shards:
        stream = list(itertools.chain.from_iterable(itertools.islice(documents, shard.documents)))
        assert len(stream) == shard.tokens
        for start in range(0, len(stream) - SEQUENCE_LENGTH, SEQUENCE_LENGTH):
            sample = store[index]
            assert sample.dtype == np.int64
            assert sample.tolist() == stream[start : start + SEQUENCE_LENGTH + 1]
            index += 1
    assert index == len(store)
    assert list(documents) == []
    with pytest.raises(IndexError):
        store[index]


def test_batches_hold_the_store_s_samples(shards: Path) -> None:
    data = dataset(shards, sequence_length=3000)
    store = TokenStore(shards, "train", 3000)
    batch = next(iter(data))
    for tokens, index in zip(batch["tokens"], batch["sample_ids"], strict=True):
        assert tokens.tolist() == store[int(index)].tolist(), "longer than a block, so every sample straddles members"


def test_open_maps_are_bounded_and_not_pickled(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN_SHARDS", 2)
    store = TokenStore(shards, "train", SEQUENCE_LENGTH)
    expected = [store[index].tolist() for index in range(len(store))]
    assert len(store._maps) == 2 < len(store.shards)
    copy = pickle.loads(pickle.dumps(store))
    assert len(copy._maps) == 0
    assert [copy[index].tolist() for index in range(len(copy))] == expected


@settings(max_examples=60)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=9), seed=st.integers(0, 2**63 - 1), window=st.integers(1, 5))
def test_order_is_a_permutation_within_windows(counts: list[int], seed: int, window: int) -> None:
    size = sum(counts)
    if not size:
        return
    order = SampleOrder(np.array(counts), seed, window)
    ids = order.sample_ids(0, 3 * size)
    for epoch in range(3):
        assert sorted(ids[epoch * size : (epoch + 1) * size]) == list(range(size))
    again = SampleOrder(np.array(counts), seed, window)
    assert [int(again.sample_ids(position, 1)[0]) for position in reversed(range(3 * size))] == ids[::-1].tolist()
    shard_of = np.repeat(np.arange(len(counts)), counts)[ids[:size]]
    open_at_once = [set(shard_of[start:]) & set(shard_of[: start + 1]) for start in range(size)]
    assert max(map(len, open_at_once)) <= window


def test_the_order_is_pinned() -> None:
    order = SampleOrder(np.array([3, 4, 2]), seed=1234, window_shards=2)
    assert order.sample_ids(0, 18).tolist() == PINNED_ORDER, "a change breaks every run that resumes"


def test_a_sequence_longer_than_the_split(shards: Path) -> None:
    with pytest.raises(DataError, match=r"split 'validation' holds no sample of sequence_length 100000 .*lower the sequence length"):
        TokenStore(shards, "validation", 100_000)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"global_batch_size": 18, "data_parallel_size": 4},
            r"global_batch_size 18 is not a multiple of micro_batch_size 2 \* data_parallel_size 4 = 8",
        ),
        ({"consumed_samples": 24}, "consumed_samples 24 is not a multiple of global_batch_size 16"),
        ({"consumed_samples": -16}, "consumed_samples -16"),
        ({"data_parallel_rank": 1}, "data_parallel_rank 1"),
        ({"micro_batch_size": 0}, "micro_batch_size 0"),
        ({"seed": -1}, "seed is -1"),
        ({"window_shards": 0}, "window_shards is 0"),
        ({"sequence_length": 0}, "sequence_length is 0"),
    ],
)
def test_arithmetic_that_does_not_work_out(shards: Path, changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataset(shards, **changes)


def test_missing_and_cut_shards(tmp_path: Path, shards: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    shard = copy / "train-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:-512])
    with pytest.raises(ManifestError, match=rf"train-000001.tar has {len(content) - 512} bytes, .* `python -m data_tools verify"):
        dataset(copy)
    shard.unlink()
    with pytest.raises(ManifestError, match=r"train-000001.tar is missing: .* `python -m data_tools verify"):
        dataset(copy)
    TokenStore(copy, "validation", SEQUENCE_LENGTH)
    with pytest.raises(ManifestError, match="no split 'test', there is: train, validation"):
        TokenStore(copy, "test", SEQUENCE_LENGTH)
    with pytest.raises(ManifestError, match="manifest.json is missing"):
        TokenStore(tmp_path / "nowhere", "train", SEQUENCE_LENGTH)
