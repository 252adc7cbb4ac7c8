"""The commands as a user types them: the whole path, stdlib corpus, inspect, stats, help."""

from __future__ import annotations

import gzip
import json
import math
import os
import subprocess
import sysconfig
import time
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from data_tools.corpus import write_stdlib
from data_tools.errors import DataError
from data_tools.stats import unigram_entropy
from tests.data_tools.helpers import ENVIRONMENT, assert_clear_error, command, documents_of, run


@pytest.fixture(scope="module")
def small_stdlib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A standard library without Lib/test, with what must be left out."""
    root, real = tmp_path_factory.mktemp("python"), Path(sysconfig.get_path("stdlib"))
    for name in ("abc.py", "ast.py", "json/decoder.py", "pydoc_data/topics.py", "lib2to3/Grammar.txt"):
        if (real / name).exists():
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_bytes((real / name).read_bytes())
    (root / "again.py").write_bytes((real / "abc.py").read_bytes())
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# " + b"\xe9" * 100)
    (root / "tiny.py").write_text("x = 1\n")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "other.py").write_text("# not the standard library\n" * 10)
    return root


def lines(content: bytes) -> list[dict[str, str]]:
    return [json.loads(line) for line in content.splitlines()]


def test_stdlib_corpus_without_its_tests(tmp_path: Path, small_stdlib: Path) -> None:
    result = write_stdlib(tmp_path / "c.jsonl", small_stdlib)
    documents = lines((tmp_path / "c.jsonl").read_bytes())
    names = [document["name"] for document in documents]
    assert result.documents == len(documents)
    assert result.text_bytes == sum(len(document["text"].encode()) for document in documents)
    assert {"abc.py", "ast.py", "json/decoder.py", "pydoc_data/topics.py#for"} <= set(names)
    assert not {"again.py", "latin.py", "tiny.py", "site-packages/other.py", "pydoc_data/topics.py"} & set(names)
    assert names == sorted(names)
    assert len({document["text"] for document in documents}) == len(documents)
    topic = next(document["text"] for document in documents if document["name"] == "pydoc_data/topics.py#for")
    assert topic.startswith('The "for" statement')
    for name, decompress in (("c.jsonl.gz", gzip.decompress), ("c.jsonl.zst", zstandard.decompress)):
        write_stdlib(tmp_path / name, small_stdlib)
        assert lines(decompress((tmp_path / name).read_bytes())) == documents


def test_stdlib_corpus_is_not_written_twice_nor_over_other_files(tmp_path: Path, small_stdlib: Path) -> None:
    output = tmp_path / "c.jsonl.zst"
    assert not write_stdlib(output, small_stdlib).already_there
    modified = output.stat().st_mtime_ns
    assert write_stdlib(output, small_stdlib).already_there
    assert output.stat().st_mtime_ns == modified
    output.write_bytes(b"mine")
    with pytest.raises(DataError, match="c.jsonl.zst exists with other content.*--overwrite"):
        write_stdlib(output, small_stdlib)
    assert output.read_bytes() == b"mine"
    assert not write_stdlib(output, small_stdlib, overwrite=True).already_there
    with pytest.raises(DataError, match="no standard library sources"):
        write_stdlib(tmp_path / "d.jsonl", tmp_path / "nowhere")
    with pytest.raises(DataError, match="must end in .jsonl"):
        write_stdlib(tmp_path / "c.tar", small_stdlib)


def test_from_the_standard_library_to_verified_shards(tmp_path: Path) -> None:
    corpus, tokenizer, shards = tmp_path / "corpus.jsonl.zst", tmp_path / "tokenizer", tmp_path / "shards"
    assert "documents" in run("corpus", "stdlib", "--output", corpus).stdout
    assert len(zstandard.decompress(corpus.read_bytes())) > 5_000_000
    assert run("train-tokenizer", "--input", corpus, "--vocab-size", 512, "--output", tokenizer).returncode == 0
    result = run("tokenize", "--input", corpus, "--tokenizer", tokenizer, "--output", shards, "--validation-fraction", "0.02")
    assert result.returncode == 0, result.stderr
    assert "train tokens" in result.stdout and "validation tokens" in result.stdout
    assert run("verify", shards).returncode == 0
    assert unigram_entropy(shards, "validation") < math.log(512)


def test_unigram_entropy_is_that_of_the_split_s_own_counts(shards: Path) -> None:
    for split in ("train", "validation"):
        counts = Counter(token for document in documents_of(shards, split) for token in document)
        total = counts.total()
        expected = -sum(count / total * math.log(count / total) for count in counts.values())
        assert unigram_entropy(shards, split) == pytest.approx(expected, rel=1e-12)


def test_stats(shards: Path) -> None:
    stats = json.loads(run("stats", shards, "--json").stdout)
    for split in ("train", "validation"):
        lengths = sorted(map(len, documents_of(shards, split)))
        found = stats["splits"][split]
        assert (found["documents"], found["tokens"]) == (len(lengths), sum(lengths))
        assert (found["tokens_per_document"]["min"], found["tokens_per_document"]["max"]) == (lengths[0], lengths[-1])
        assert found["tokens_per_document"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
        assert found["unigram_entropy_nats"] == pytest.approx(unigram_entropy(shards, split))
    table = run("stats", shards).stdout
    assert "unigram entropy" in table
    assert f"{stats['splits']['train']['tokens']:,}" in table


def test_inspect(shards: Path, texts: list[str]) -> None:
    documents = run("inspect", shards, "--count", 2, "--characters", 5000).stdout
    assert documents.count("--- train document") == 2
    assert sum(text.strip()[:200] in documents for text in texts if len(text) > 300) == 2
    tail = run("inspect", shards, "--split", "validation", "--sequence-length", 32, "--count", 1000, "--start", 3).stdout
    assert "--- validation sample 3 of" in tail
    assert "<|endoftext|>" in tail, "samples run over the ends of documents"
    assert_clear_error(run("inspect", shards, "--start", 100_000), "--start 100000", "documents")
    assert_clear_error(run("inspect", shards.parent), "manifest.json is missing")
    assert_clear_error(run("stats", shards / "x"), "manifest.json is missing")


@pytest.mark.parametrize("name", [(), ("corpus",), ("train-tokenizer",), ("tokenize",), ("verify",), ("inspect",), ("stats",)])
def test_help_answers_without_heavy_imports(name: tuple[str, ...]) -> None:
    before, start = os.times().children_user + os.times().children_system, time.perf_counter()
    result = run(*name, "--help")
    cpu_s = os.times().children_user + os.times().children_system - before
    assert (result.returncode, min(cpu_s, time.perf_counter() - start) < 5) == (0, True)
    assert "usage: python -m data_tools" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, data_tools.cli\ntry: data_tools.cli.main(['tokenize', '--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'numpy', 'torch', 'tokenizers', 'pyarrow', 'tqdm'} & set(sys.modules)\nassert not heavy, heavy"
    assert subprocess.run([command()[0], "-c", code], env=ENVIRONMENT, capture_output=True).returncode == 0


def test_progress_in_a_log_file_is_lines() -> None:
    code = (
        "from data_tools import progress\nprogress.LOG_INTERVAL_S = 0\n"
        "with progress.Progress('tokenize', 200) as bar:\n    bar.update(100)\n    bar.update(100)\n"
    )
    result = subprocess.run([command()[0], "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    first, second = result.stderr.splitlines()
    assert first.startswith("tokenize: 50% | 100 B of 200 B | ")
    assert second.startswith("tokenize: 100% | 200 B of 200 B | ")


def test_the_benchmark_prints_json() -> None:
    root = Path(sysconfig.get_path("stdlib")) / "json"
    arguments = ("--roots", root, "--megabytes", 1, "--vocab-size", 300, "--workers", 1, "--repetitions", 1)
    line = [command()[0], "-m", "data_tools.benchmark", *map(str, arguments)]
    result = json.loads(subprocess.run(line, env=ENVIRONMENT, capture_output=True, check=True, timeout=100).stdout)
    assert result["tokenize"][0]["megabytes_per_cpu_s"] > 0
    assert result["reader"][0]["tokens_per_s"] > 0


def test_the_examples_of_the_help_are_commands() -> None:
    from data_tools.cli import EXAMPLE

    assert all(line.startswith("  python -m data_tools ") for line in EXAMPLE.splitlines()[1:])
