"""The job: what it writes, the same bytes for any number of workers, unit size and memory bound."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import webdataset
import xxhash
from tokenizers import Tokenizer

from data_tools import dedup
from data_tools.manifest import Manifest
from data_tools.tokenize import tokenize
from tests.data_tools.helpers import (
    SMALL,
    assert_clear_error,
    command,
    documents_of,
    folder_bytes,
    job_options,
    run,
    tokenize_here,
    write_jsonl,
)


@pytest.fixture(scope="module")
def mixed_inputs(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> list[Path]:
    """One file of each kind, with duplicates inside and across files, empty documents and special-token text."""
    folder = tmp_path_factory.mktemp("mixed")
    third = len(texts) // 3
    write_jsonl(folder / "a.jsonl", [*texts[:third], texts[0], "", "  \n", "about <|endoftext|> here"])
    write_jsonl(folder / "b.jsonl.gz", [*texts[third - 5 : 2 * third], texts[2]])
    write_jsonl(folder / "c.jsonl.zst", [texts[1], *texts[2 * third - 5 :]])
    (folder / "d.txt").write_text(texts[3], encoding="utf-8")
    (folder / "e.txt").write_text("only here\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts[-7:], "parquet only"]}), folder / "f.parquet", row_group_size=3)
    return sorted(folder.iterdir())


def test_the_tokens_are_those_of_a_literal_reference(tmp_path: Path, tokenizer: Path, mixed_inputs: list[Path], texts: list[str]) -> None:
    manifest = tokenize_here(mixed_inputs, tokenizer, tmp_path / "out")
    reference = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    third = len(texts) // 3
    kept = [*texts[:third], "about <|endoftext|> here", *texts[third:], "only here\n", "parquet only"]
    expected: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for text in kept:
        part = int.from_bytes(xxhash.xxh3_128_digest(text.encode())[8:16], "little")
        reference.encode_special_tokens = "<|endoftext|>" in text
        expected["validation" if part < 2**64 // 10 else "train"].append([*reference.encode(text).ids, 0])
    assert expected["validation"], "the test corpus must have held-out documents"
    for split, documents_expected in expected.items():
        assert documents_of(tmp_path / "out", split) == documents_expected
        assert manifest.documents(split) == len(documents_expected)
        assert manifest.tokens(split) == sum(map(len, documents_expected))
    filters = manifest.content["filters"]
    assert (filters["kept"], filters["empty"], filters["duplicate"]) == (len(kept), 2, 21)
    assert filters["documents"] == len(kept) + 23 == sum(source["documents"] for source in manifest.content["sources"])


def test_the_same_bytes_for_1_2_and_5_workers(tmp_path: Path, tokenizer: Path, mixed_inputs: list[Path]) -> None:
    outputs = []
    for workers in (1, 2, 5):
        output = tmp_path / f"workers{workers}"
        result = run(
            "tokenize",
            "--input",
            *mixed_inputs,
            "--tokenizer",
            tokenizer,
            "--output",
            output,
            "--workers",
            workers,
            "--unit-bytes",
            9000,
            *SMALL,
        )
        assert result.returncode == 0, result.stderr
        outputs.append(folder_bytes(output))
    assert len([name for name in outputs[0] if name.endswith(".tar")]) > 5
    assert outputs[0] == outputs[1] == outputs[2]
    assert str(tmp_path).encode() not in outputs[0]["manifest.json"]


def test_bytes_do_not_depend_on_units_partitions_or_place(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts + texts[::3])
    expected = folder_bytes(tokenize_here([corpus], tokenizer, tmp_path / "one").directory)
    monkeypatch.setattr(dedup.plan_documents, "__defaults__", (40,))
    (tmp_path / "elsewhere").mkdir()
    moved = corpus.rename(tmp_path / "elsewhere" / "corpus.jsonl")
    tokenize([moved], tokenizer, tmp_path / "two", job_options(), workers=1, unit_bytes=5000)
    assert folder_bytes(tmp_path / "two") == expected


def test_all_backends_give_the_same_shards(tmp_path: Path, tokenizer: Path, mixed_inputs: list[Path]) -> None:
    digests = []
    for backend in ("gigatoken", "tiktoken", "tokenizers"):
        manifest = tokenize_here(mixed_inputs, tokenizer, tmp_path / backend, backend=backend)
        assert manifest.content["backend"]["name"] == backend
        assert set(manifest.content["backend"]["versions"]) == {backend, "tokenizers"}
        digests.append([shard.sha256 for shard in manifest.shards])
    assert digests[0] == digests[1] == digests[2]


def test_webdataset_reads_the_shards(shards: Path) -> None:
    manifest = Manifest.load(shards)
    for split in ("train", "validation"):
        found = []
        for sample in webdataset.WebDataset([str(shards / shard.name) for shard in manifest.shards_of(split)], shardshuffle=False):
            tokens = memoryview(sample["tokens.u16"]).cast("H").tolist()
            for length in memoryview(sample["lens.u32"]).cast("I"):
                found.append(tokens[:length])
                tokens = tokens[length:]
            assert tokens == []
        assert found == documents_of(shards, split)


def test_blocks_hold_whole_documents_of_about_the_asked_size(shards: Path) -> None:
    manifest = Manifest.load(shards)
    train = manifest.shards_of("train")
    assert len(train) > 5
    for shard in train[:-1]:
        assert 8000 <= shard.tokens < 8000 + 2000 + 900
        assert all(2000 <= block[1] < 2000 + 900 for block in shard.blocks)
        assert [shard.name[:5], shard.name[-4:]] == ["train", ".tar"]


def test_wide_ids(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", texts)
    narrow = tokenize_here([corpus], tokenizer, tmp_path / "u16")
    wide = tokenize_here([corpus], tokenizer, tmp_path / "u32", dtype="uint32")
    assert (narrow.dtype, wide.dtype) == ("uint16", "uint32")
    assert documents_of(tmp_path / "u16", "train") == documents_of(tmp_path / "u32", "train")
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "u32" / "train-000000.tar"), shardshuffle=False)))
    assert memoryview(sample["tokens.u32"]).cast("I")[0] == documents_of(tmp_path / "u32", "train")[0][0]


def test_split_depends_on_the_text_alone(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    shuffled = texts[:]
    random.Random(0).shuffle(shuffled)
    tokenize_here([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer, tmp_path / "a")
    tokenize_here([write_jsonl(tmp_path / "b.jsonl", shuffled[:200])], tokenizer, tmp_path / "b")
    held_out = {tuple(document) for document in documents_of(tmp_path / "a", "validation")}
    assert {tuple(document) for document in documents_of(tmp_path / "b", "validation")} <= held_out
    assert not held_out & {tuple(document) for document in documents_of(tmp_path / "b", "train")}


def test_a_finished_job_is_not_done_again_and_nothing_is_overwritten(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    corpus, output = write_jsonl(tmp_path / "c.jsonl", texts), tmp_path / "out"
    arguments = ("tokenize", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", 1)
    assert "written" in run(*arguments, *SMALL).stdout
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    again = run(*arguments, *SMALL)
    assert again.returncode == 0
    assert "already there" in again.stdout
    assert_clear_error(run(*arguments), output, "another job", "block_tokens", "--overwrite")
    other = write_jsonl(tmp_path / "other.jsonl", texts[:50])
    assert_clear_error(run(*arguments[:2], other, *arguments[3:], *SMALL), "another job (other inputs)")
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (output / "notes.txt").write_text("mine")
    assert run(*arguments[:2], other, *arguments[3:], *SMALL, "--overwrite").returncode == 0
    assert Manifest.load(output).content["sources"][0]["name"] == "other.jsonl"
    assert {shard.name for shard in Manifest.load(output).shards} == {path.name for path in output.glob("*.tar")}
    assert (output / "notes.txt").read_text() == "mine"


def test_two_runs_at_once_and_foreign_folders(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    arguments = ("tokenize", "--input", corpus, "--tokenizer", tokenizer, "--workers", 1, "--output")
    assert_clear_error(run(*arguments, tmp_path), "holds other files (c.jsonl", "new folder")
    assert_clear_error(run(*arguments, corpus), "is a file")
    (tmp_path / "out" / ".tokenize").mkdir(parents=True)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [*command()[:1], "-c", holder, tmp_path / "out" / ".tokenize" / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        assert_clear_error(run(*arguments, tmp_path / "out"), "another tokenize is writing", tmp_path / "out")
    finally:
        process.communicate()
    assert run(*arguments, tmp_path / "out").returncode == 0


def test_the_manifest_is_readable_json_with_the_promised_fields(shards: Path, tokenizer: Path) -> None:
    content = json.loads((shards / "manifest.json").read_bytes())
    assert content["format_version"] == 1
    assert content["tokenizer"]["sha256"] == hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()
    assert (shards / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert (content["tokenizer"]["vocab_size"], content["tokenizer"]["eod_id"], content["dtype"]) == (600, 0, "uint16")
    for shard in content["shards"]:
        raw = (shards / shard["name"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard["size"], shard["sha256"])
        assert sum(block[1] for block in shard["blocks"]) == shard["tokens"]
        assert sum(block[3] for block in shard["blocks"]) == shard["documents"]
