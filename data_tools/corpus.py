"""A corpus that every Python brings along: the standard library's sources and prose.

Documents are the `.py`, `.txt`, `.rst` and `.md` files below `sysconfig`'s stdlib folder and the topics of the
language reference that `help()` shows, each once (SHA-256), 64 bytes to 1 MB, in UTF-8. Some distributions leave out
`Lib/test` (about half of it): whatever is there is taken and counted, nothing is expected.
"""

from __future__ import annotations

import hashlib
import io
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import DataError
from data_tools.files import write_atomically
from data_tools.progress import Progress

SUFFIXES = frozenset({".py", ".txt", ".rst", ".md"})
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
MIN_BYTES = 64
MAX_BYTES = 1_000_000
TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class CorpusResult:
    """What was written: documents, UTF-8 bytes of their text, and whether the same file was already there."""

    documents: int
    text_bytes: int
    already_there: bool


def stdlib_documents(root: Path) -> Iterator[tuple[str, bytes]]:
    """Names and UTF-8 texts of the documents below `root`, each text once, in the order of their names."""
    paths = sorted(
        (path.relative_to(root).as_posix(), path)
        for path in root.rglob("*")
        if path.suffix in SUFFIXES and not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )
    seen = set()
    with Progress("corpus", len(paths), "files") as progress:
        for name, path in paths:
            progress.update(1)
            content = path.read_bytes()
            for part, text in _topics(content) if name == TOPICS else [(name, content)]:
                digest = hashlib.sha256(text).digest()
                if MIN_BYTES <= len(text) <= MAX_BYTES and digest not in seen and _is_utf8(text):
                    seen.add(digest)
                    yield part, text


def _topics(content: bytes) -> Iterator[tuple[str, bytes]]:
    """The file is one dictionary of prose: each topic is a document."""
    namespace: dict = {}
    exec(compile(content, TOPICS, "exec"), namespace)
    for topic, text in sorted(namespace["topics"].items()):
        yield f"{TOPICS}#{topic}", text.encode()


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def write_stdlib(output: Path, root: Path | None = None, overwrite: bool = False) -> CorpusResult:
    """Writes the corpus as .jsonl, .jsonl.gz or .jsonl.zst: objects with `text` and `name`.

    Raises DataError for another suffix, when nothing is found, or when `output` is another file and not `overwrite`.
    """
    compress = _compressor(output)
    root = root or Path(sysconfig.get_path("stdlib"))
    buffer = io.BytesIO()
    documents = text_bytes = 0
    for name, text in stdlib_documents(root):
        buffer.write(json.dumps({"text": text.decode(), "name": name}, ensure_ascii=False).encode() + b"\n")
        documents += 1
        text_bytes += len(text)
    if not documents:
        raise DataError(f"no standard library sources in {root}: install the full Python (packages python3, libpython3-stdlib)")
    content = compress(buffer.getvalue())
    already_there = output.is_file() and output.read_bytes() == content
    if not already_there:
        if output.exists() and not overwrite:
            raise DataError(f"{output} exists with other content: choose another --output or pass --overwrite")
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, content)
    return CorpusResult(documents, text_bytes, already_there)


def _compressor(output: Path) -> Callable[[bytes], bytes]:
    if output.name.endswith(".jsonl"):
        return bytes
    if output.name.endswith(".jsonl.gz"):
        import gzip

        return lambda content: gzip.compress(content, mtime=0)
    if output.name.endswith(".jsonl.zst"):
        import zstandard

        return zstandard.ZstdCompressor(level=9).compress
    raise DataError(f"--output {output}: the name must end in .jsonl, .jsonl.gz or .jsonl.zst")
