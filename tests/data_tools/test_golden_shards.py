"""Format version 1 on disk: shards written by the first release are read by this one, and written again byte for byte.

The files in golden/ are never regenerated for a format version that has been released: a reader must go on reading
them, and a change of what is written needs a new format version with golden files of its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from data_tools.manifest import Manifest
from data_tools.reader import TokenDataset, TokenStore
from data_tools.verify import verify
from tests.data_tools.helpers import tokenize_here

GOLDEN = Path(__file__).parent / "golden"
SAMPLES_SHA256 = {
    "train": (94, "c68a1253a72ec42a3e327d03f21b8a2ab78fd6c96293c505d74b800956232939"),
    "validation": (7, "f80e8136715f54f5586846e255417a7b5527d94d3621802b00f11793a5df132b"),
}
FIRST_SAMPLE_IDS = [72, 75, 34, 56, 52, 55, 32, 57]


def test_reads_what_the_first_release_wrote() -> None:
    assert verify(GOLDEN / "shards") == []
    assert Manifest.load(GOLDEN / "shards").digest == "f8ae1482f351d88708dc44e461b6677de648428314000ed2267a477720278377"
    for split, expected in SAMPLES_SHA256.items():
        store = TokenStore(GOLDEN / "shards", split, sequence_length=16)
        content = b"".join(store[index].tobytes() for index in range(len(store)))
        assert (len(store), hashlib.sha256(content).hexdigest()) == expected


def test_the_order_of_samples_is_the_first_release_s() -> None:
    dataset = TokenDataset(GOLDEN / "shards", "train", sequence_length=16, seed=3, micro_batch_size=8, global_batch_size=8)
    assert next(iter(dataset))["sample_ids"].tolist() == FIRST_SAMPLE_IDS


def test_writes_the_same_shards(tmp_path: Path) -> None:
    manifest = tokenize_here([GOLDEN / "corpus.jsonl"], GOLDEN / "shards", tmp_path / "out", block_tokens=200, shard_tokens=400)
    golden = json.loads((GOLDEN / "shards" / "manifest.json").read_bytes())
    assert manifest.content == {
        **{key: value for key, value in golden.items() if key != "checksum"},
        "backend": manifest.content["backend"],
    }
    for shard in manifest.shards:
        assert (tmp_path / "out" / shard.name).read_bytes() == (GOLDEN / "shards" / shard.name).read_bytes()
