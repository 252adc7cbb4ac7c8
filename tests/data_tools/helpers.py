"""What the tests of data_tools share: running the real command, writing corpora, reading results back."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

import data_tools
from data_tools.job import TokenizeOptions
from data_tools.manifest import Manifest
from data_tools.store import TokenStore
from data_tools.tokenize import tokenize

ROOT = Path(data_tools.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SMALL = ("--block-tokens", 2000, "--shard-tokens", 8000, "--validation-fraction", "0.1")
"""Options of `tokenize` for many blocks and shards; `job_options` are the same."""


def command(*arguments: object) -> list[str]:
    """The command line of `python -m data_tools`."""
    return [sys.executable, "-m", "data_tools", *map(str, arguments)]


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python -m data_tools` to its end."""
    return subprocess.run(command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


def assert_clear_error(result: subprocess.CompletedProcess[str], *words: object) -> None:
    """Exit status 2, no traceback, one line that holds all `words`."""
    assert result.returncode == 2, result
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    """A jsonl file, compressed as its name says."""
    content = b"".join(json.dumps({"id": index, field: text}).encode() + b"\n" for index, text in enumerate(texts))
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path


def job_options(**changes: Any) -> TokenizeOptions:
    """Options of a small job: many blocks and shards."""
    values = {
        "validation_fraction": Decimal("0.1"),
        "text_field": "text",
        "on_invalid": "error",
        "backend": "auto",
        "dtype": "auto",
        "block_tokens": 2000,
        "shard_tokens": 8000,
    }
    return TokenizeOptions(**{**values, **changes})


def tokenize_here(inputs: list[Path], tokenizer: Path, output: Path, **changes: Any) -> Manifest:
    """Runs a small job in this process."""
    return tokenize(inputs, tokenizer, output, job_options(**changes), workers=1).manifest


def documents_of(directory: Path, split: str) -> list[list[int]]:
    """The documents of a split as ids, each with its end-of-document token, in their written order."""
    store = TokenStore(directory, split, sequence_length=1)
    documents = []
    for index, shard in enumerate(store.shards):
        tokens = np.empty(shard.tokens, dtype=np.int64)
        store.read_tokens(index, 0, tokens)
        documents += [part.tolist() for part in np.split(tokens, np.cumsum(store.document_lengths(index))[:-1])]
    return documents


def folder_bytes(directory: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
