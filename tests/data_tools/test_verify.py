"""`verify`: a flipped bit anywhere, and files that are cut, missing, swapped or foreign; the manifest's own errors."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_tools.errors import ManifestError
from data_tools.manifest import Manifest, encode_manifest
from data_tools.verify import verify
from tests.data_tools.helpers import assert_clear_error, run


@pytest.fixture
def copy(tmp_path: Path, shards: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "shards")


def findings(directory: Path) -> list[str]:
    return [finding.file for finding in verify(directory, threads=2)]


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_untouched(shards: Path) -> None:
    assert findings(shards) == []
    result = run("verify", shards)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("place", ["header", "second header", "tokens", "last token", "lens", "padding", "end"])
def test_a_flipped_bit_in_a_shard(copy: Path, place: str) -> None:
    shard = Manifest.load(copy).shards_of("train")[1]
    tokens_offset, num_tokens, lens_offset, num_documents = shard.blocks[1]
    position = {
        "header": tokens_offset - 512 + 5,
        "second header": lens_offset - 512 + 150,
        "tokens": tokens_offset,
        "last token": tokens_offset + 2 * num_tokens - 1,
        "lens": lens_offset + 1,
        "padding": lens_offset + 4 * num_documents,
        "end": shard.size - 1,
    }[place]
    flip(copy / shard.name, position, bit=3)
    result = run("verify", copy)
    assert result.returncode == 1
    assert result.stdout.startswith(f"{copy / shard.name}: content has changed")
    assert "Traceback" not in result.stderr


def test_a_flipped_bit_anywhere_in_the_manifest_or_tokenizer(copy: Path) -> None:
    path = copy / "manifest.json"
    size = path.stat().st_size
    for position in [*range(0, size, 97), size - 1]:
        for bit in (0, 5, 7):
            flip(path, position, bit)
            assert findings(copy) == ["manifest.json"], (position, bit)
            flip(path, position, bit)
    assert findings(copy) == []
    flip(copy / "tokenizer.json", 1000)
    assert findings(copy) == ["tokenizer.json"]


def test_truncated_extended_missing_swapped_and_foreign_files(copy: Path) -> None:
    names = [f"train-{index:06d}.tar" for index in range(5)]
    (copy / names[0]).write_bytes((copy / names[0]).read_bytes()[:-10240])
    (copy / names[1]).write_bytes((copy / names[1]).read_bytes() + bytes(512))
    (copy / names[2]).unlink()
    (copy / names[3]).rename(copy / "spare")
    (copy / names[4]).rename(copy / names[3])
    (copy / "spare").rename(copy / names[4])
    (copy / "train-000099.tar").write_bytes(b"")
    (copy / ".tokenize").mkdir()
    found = {finding.file: finding.problem for finding in verify(copy)}
    assert sorted(found) == sorted([*names, "train-000099.tar", ".tokenize"])
    for name, words in zip(names, ("truncated", "extended", "missing", "", ""), strict=True):
        assert words in found[name]
    assert "foreign" in found["train-000099.tar"]
    result = run("verify", copy)
    assert result.returncode == 1
    assert all(f"{copy / name}: " in result.stdout for name in found)


def test_shards_of_the_same_size_swapped(copy: Path) -> None:
    first, second = copy / "train-000000.tar", copy / "train-000001.tar"
    size = max(first.stat().st_size, second.stat().st_size)
    content = json.loads((copy / "manifest.json").read_bytes())
    content.pop("checksum")
    for path, entry in zip((first, second), content["shards"], strict=False):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        entry.update(size=size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    (copy / "manifest.json").write_bytes(encode_manifest(content))
    assert findings(copy) == []
    first.rename(copy / "spare")
    second.rename(first)
    (copy / "spare").rename(second)
    assert findings(copy) == ["train-000000.tar", "train-000001.tar"]


def test_missing_manifest_and_missing_folder(copy: Path, tmp_path: Path) -> None:
    (copy / "manifest.json").unlink()
    result = run("verify", copy)
    assert result.returncode == 1
    assert "manifest.json is missing" in result.stdout
    assert_clear_error(run("verify", tmp_path / "nowhere"), "nowhere is not a folder")


def rewrite(copy: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((copy / "manifest.json").read_bytes())
    content.pop("checksum")
    change(content)
    (copy / "manifest.json").write_bytes(encode_manifest(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(format_version=2), "format_version is 2, this release reads up to 1: upgrade"),
        (lambda content: content.update(format_version=0), "format_version 0 is unknown"),
        (lambda content: content.pop("dtype"), "field dtype is missing or not a str"),
        (lambda content: content.update(dtype="float32"), "field dtype is 'float32'"),
        (lambda content: content["tokenizer"].pop("eod_id"), "field tokenizer.eod_id is missing"),
        (lambda content: content["shards"][2].pop("size"), r"field shards\[2\] is malformed"),
    ],
)
def test_a_manifest_that_is_consistent_but_wrong(copy: Path, change: Callable[[dict], object], words: str) -> None:
    rewrite(copy, change)
    with pytest.raises(ManifestError, match=rf"manifest.json: .*{words}"):
        Manifest.load(copy)


def test_the_digest_is_the_checksum_and_stable(copy: Path, shards: Path) -> None:
    digest = Manifest.load(shards).digest
    assert digest == json.loads((shards / "manifest.json").read_bytes())["checksum"] == Manifest.load(copy).digest
    assert len(digest) == 64
    rewrite(copy, lambda content: content["filters"].update(empty=1))
    assert Manifest.load(copy).digest != digest
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes().replace(b'"empty": 1', b'"empty": 2', 1))
    with pytest.raises(ManifestError, match="damaged or was edited by hand"):
        Manifest.load(copy)
