"""What a user can do wrong, and a disk that fills up: one clear line, exit status 2, nothing half published."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.manifest import Manifest
from tests.data_tools.helpers import ENVIRONMENT, assert_clear_error, command, folder_bytes, run, tokenize_here, write_jsonl


def tokenize(corpus: Path, tokenizer: Path, output: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return run("tokenize", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", 1, *arguments)


def test_inputs(tmp_path: Path, tokenizer: Path) -> None:
    output = tmp_path / "out"
    assert_clear_error(tokenize(tmp_path / "none.jsonl", tokenizer, output), "none.jsonl", "does not exist", "--input")
    assert_clear_error(tokenize(write_jsonl(tmp_path / "a.jsonl", ["x"]), tmp_path, output), "tokenizer.json does not exist", "--tokenizer")
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert_clear_error(tokenize(empty, tokenizer, output), "empty corpus", "empty.jsonl", "--input")
    blank = write_jsonl(tmp_path / "blank.jsonl.gz", ["", " \n"])
    assert_clear_error(tokenize(blank, tokenizer, tmp_path / "out2"), "empty corpus", "blank.jsonl.gz", "2 empty")
    other = write_jsonl(tmp_path / "other.jsonl", ["x"], field="body")
    assert_clear_error(tokenize(other, tokenizer, tmp_path / "out3"), "other.jsonl, line 1", "field 'text'", "--text-field")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(3000))[:-9])
    assert_clear_error(tokenize(tmp_path / "cut.jsonl.gz", tokenizer, tmp_path / "out4"), "cut.jsonl.gz", "gzip")
    assert not list(tmp_path.glob("out*/manifest.json"))


def test_text_that_is_not_utf8_stops_or_is_counted(tmp_path: Path, tokenizer: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_bytes(b'{"text": "first"}\n{"text": "\xff\xfe"}\n{"text": "third"}\nbroken\n{"body": "x"}\n')
    result = tokenize(corpus, tokenizer, tmp_path / "out")
    assert_clear_error(result, "c.jsonl, line 2", "not UTF-8", "--on-invalid skip")
    assert not (tmp_path / "out" / "manifest.json").exists()
    result = tokenize(corpus, tokenizer, tmp_path / "skipped", "--on-invalid", "skip", "--validation-fraction", 0)
    assert result.returncode == 0
    assert "left out: 1 invalid_utf8, 1 invalid_json, 1 missing_text" in result.stdout
    filters = Manifest.load(tmp_path / "skipped").content["filters"]
    assert (filters["documents"], filters["kept"]) == (5, 2)


def test_an_error_in_a_worker_process_is_as_clear(tmp_path: Path, tokenizer: Path) -> None:
    good, bad = write_jsonl(tmp_path / "a.jsonl", ["fine"] * 3), tmp_path / "b.txt"
    bad.write_bytes(b"a\nb\xff")
    result = run("tokenize", "--input", good, bad, "--tokenizer", tokenizer, "--output", tmp_path / "out", "--workers", 2)
    assert_clear_error(result, "b.txt, line 2", "not UTF-8")


def test_vocabulary_larger_than_the_dtype(tmp_path: Path, tokenizer: Path) -> None:
    definition = json.loads((tokenizer / "tokenizer.json").read_bytes())
    definition["added_tokens"].append({**definition["added_tokens"][0], "id": 70_000, "content": "<|far|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    corpus = write_jsonl(tmp_path / "c.jsonl", ["hello"])
    result = tokenize(corpus, tmp_path / "tokenizer.json", tmp_path / "out", "--dtype", "u16")
    assert_clear_error(result, "vocabulary of 70001 ids does not fit --dtype u16", "--dtype u32")
    assert not (tmp_path / "out").exists()
    assert tokenize(corpus, tmp_path / "tokenizer.json", tmp_path / "out").returncode == 0
    assert Manifest.load(tmp_path / "out").dtype == "uint32"


def test_a_token_that_text_produces_cannot_end_documents(tmp_path: Path, tokenizer: Path) -> None:
    result = tokenize(write_jsonl(tmp_path / "c.jsonl", ["one", "A"]), tokenizer, tmp_path / "out", "--eod-token", "A")
    assert_clear_error(result, "tokenizer.json", "plain text was encoded as the end-of-document token 'A'", "--eod-token")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--validation-fraction", "1"),
        ("--validation-fraction", "-0.1"),
        ("--validation-fraction", "x"),
        ("--workers", "0"),
        ("--dtype", "u8"),
        ("--backend", "fast"),
    ],
)
def test_usage(tmp_path: Path, tokenizer: Path, arguments: tuple[str, str]) -> None:
    result = tokenize(write_jsonl(tmp_path / "c.jsonl", ["hello"]), tokenizer, tmp_path / "out", *arguments)
    assert result.returncode == 2
    assert arguments[0] in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "file").write_text("")
    result = tokenize(write_jsonl(tmp_path / "c.jsonl", ["hello"]), tokenizer, tmp_path / "file" / "out")
    assert_clear_error(result, tmp_path / "file" / "out")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Path) -> tuple[Path, dict[str, bytes]]:
    """A corpus whose shard takes about 1.3 MB, and the shards folder it gives."""
    folder = tmp_path_factory.mktemp("large")
    corpus = write_jsonl(folder / "c.jsonl", [f"{index} {text}" for index in range(5) for text in texts])
    tokenize_here([corpus], tokenizer, folder / "out", block_tokens=1 << 16, shard_tokens=256 << 20)
    return corpus, folder_bytes(folder / "out")


LARGE = ("--validation-fraction", "0.1", "--block-tokens", 1 << 16)


def test_disk_full_by_file_size_limit(tmp_path: Path, tokenizer: Path, large: tuple[Path, dict[str, bytes]]) -> None:
    corpus, expected = large
    output = tmp_path / "out"
    arguments = ("tokenize", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", 1, *LARGE)
    line = subprocess.list2cmdline(command(*arguments))
    limited = subprocess.run(["bash", "-c", f"ulimit -f 500; exec {line}"], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert_clear_error(limited, "disk full while writing", output, "free space and run the same command again")
    assert not list(output.rglob("*.tmp"))
    assert not list(output.glob("*.tar"))
    assert run(*arguments).returncode == 0
    assert folder_bytes(output) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2.2 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    yield path
    subprocess.run(["umount", path], check=True)


def test_disk_full_while_writing_a_shard(small_disk: Path, tokenizer: Path, large: tuple[Path, dict[str, bytes]]) -> None:
    corpus, expected = large
    output = small_disk / "out"
    arguments = ("tokenize", "--input", corpus, "--tokenizer", tokenizer, "--output", output, "--workers", 1, *LARGE)
    assert_clear_error(run(*arguments), f"disk full while writing {output}/train-000000.tar", "free space and run the same command again")
    assert not list(output.rglob("*.tmp"))
    assert not list(output.glob("*.tar"))
    assert list(output.glob(".tokenize/tokens/*.npz")), "the tokens of finished units are kept"
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert run(*arguments).returncode == 0
    assert folder_bytes(output) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tokenize", "--input", "a", "--tokenizer", "b", "--output", "c", "--validation-fraction", "nan"], "nan is not in [0, 1)"),
        (["train-tokenizer", "--input", "a", "--output", ""], "--output: the path is empty: name one"),
        (["stats", " "], "shards: the path is empty: name one"),
    ],
)
def test_arguments_that_are_no_value(arguments: list[str], words: str, tmp_path: Path) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_is_a_device(tmp_path: Path, tokenizer: Path) -> None:
    assert_clear_error(tokenize(Path("/dev/null"), tokenizer, tmp_path / "out"), "/dev/null", "is no plain file")
