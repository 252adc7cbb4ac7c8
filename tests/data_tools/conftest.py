"""A small corpus of real text, a tokenizer trained on it, and shards of it."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from data_tools.tokenizer import train_tokenizer
from tests.data_tools.helpers import tokenize_here, write_jsonl

MODULES = ("argparse.py", "ast.py", "bisect.py", "calendar.py", "cmd.py", "codecs.py", "csv.py", "difflib.py", "enum.py", "heapq.py")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some 400 distinct documents: pieces of the standard library's modules, and text outside ASCII."""
    root = Path(sysconfig.get_path("stdlib"))
    pieces = []
    for module in MODULES:
        content = (root / module).read_text(encoding="utf-8")
        pieces += [content[start : start + 900] for start in range(0, len(content), 900)]
    pieces += ["naïve café, 中文字符 and 👩‍👩‍👧 emoji", "it's\r\nCRLF\ttab\u00a0nbsp", "x"]
    return list(dict.fromkeys(pieces))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """Folder of a byte-level BPE of 600 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([write_jsonl(folder / "corpus.jsonl", texts)], 600, folder / "tokenizer")
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer: Path) -> Path:
    """Shards of all texts: about ten train shards, one or two of validation. Read only."""
    folder = tmp_path_factory.mktemp("shards")
    tokenize_here([write_jsonl(folder / "corpus.jsonl", texts)], tokenizer, folder / "shards")
    return folder / "shards"
