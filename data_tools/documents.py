"""Input files as a stream of documents, cut into work units that do not depend on the number of workers.

    name ends in            a document is                          a part is
    .jsonl .ndjson .json    one line's --text-field                32 MiB of lines
    .txt .md .rst           the whole file                         the file
    .parquet                one row's --text-field column          one row group
    .gz .zst (of the above  as without the suffix                  the file, streamed
     but parquet)

A unit is a run of consecutive parts of about 32 MiB together, so that thousands of small files make few units.
A line belongs to the part in which its first byte lies. A document that cannot be used comes out as `Rejected`
instead of a string; its reader goes on, and the caller decides (`--on-invalid`). A broken container (a corrupt gzip
stream, a parquet file without the column) is a DataError at once: what follows it is lost.
"""

from __future__ import annotations

import enum
import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from data_tools.errors import DataError
from data_tools.streams import open_bytes, split_lines

if TYPE_CHECKING:
    import pyarrow.parquet

UNIT_BYTES = 32 << 20
UTF8_BOM = b"\xef\xbb\xbf"
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "text", ".md": "text", ".rst": "text", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstandard"}


class Reason(enum.IntEnum):
    """Why a document is left out; the order is part of the journal's format."""

    EMPTY = 1
    INVALID_UTF8 = 2
    INVALID_JSON = 3
    MISSING_TEXT = 4
    DUPLICATE = 5


@dataclass(frozen=True)
class Rejected:
    """A document that cannot be used: why, its line or row (from 1) inside its part, and the parser's words."""

    reason: Reason
    position: int
    detail: str


@dataclass(frozen=True)
class Source:
    """One input file."""

    path: Path
    kind: str
    """`jsonl`, `text` or `parquet`."""
    compression: str | None
    """`gzip`, `zstandard` or None."""


@dataclass(frozen=True)
class Part:
    """A part of a source: the byte range [start, stop) of a plain jsonl file, a parquet row group, or the whole file (0, 0)."""

    source: Source
    source_index: int
    """Position of the source in the order given on the command line."""
    start: int
    stop: int
    input_bytes: int
    """Bytes on disk."""


@dataclass(frozen=True)
class Unit:
    """Consecutive parts that one worker handles at a time."""

    parts: tuple[Part, ...]

    @property
    def input_bytes(self) -> int:
        """Bytes on disk, for progress."""
        return sum(part.input_bytes for part in self.parts)


def open_sources(paths: list[Path]) -> list[Source]:
    """Recognizes input files by their names and checks that they can be read. Raises DataError."""
    sources = []
    for path in paths:
        if not path.is_file():
            if path.is_dir():
                raise DataError(f"input {path} is a folder, name its files (FOLDER/*.jsonl)")
            raise DataError(f"input {path} {'is no plain file' if path.exists() else 'does not exist'}, check --input")
        if not os.access(path, os.R_OK):
            raise DataError(f"input {path} cannot be read: check its permissions")
        suffix = path.suffix.lower()
        compression = COMPRESSIONS.get(suffix)
        inner = Path(path.stem).suffix.lower() if compression else suffix
        kind = KINDS.get(inner)
        if kind is None or (compression and kind == "parquet"):
            raise DataError(
                f"input {path}: unknown kind of file; supported are {', '.join(KINDS)} and {', '.join(COMPRESSIONS)} of all but parquet"
            )
        sources.append(Source(path, kind, compression))
    return sources


def plan_units(sources: list[Source], unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Cuts the sources into units, in input order. Raises DataError for a parquet file that cannot be opened."""
    units = []
    parts: list[Part] = []
    filled = 0
    for part in _cut(sources, unit_bytes):
        parts.append(part)
        filled += part.input_bytes
        if filled >= unit_bytes:
            units.append(Unit(tuple(parts)))
            parts, filled = [], 0
    return [*units, Unit(tuple(parts))] if parts else units


def _cut(sources: list[Source], unit_bytes: int) -> Iterator[Part]:
    for index, source in enumerate(sources):
        size = source.path.stat().st_size
        if source.kind == "parquet":
            groups = open_parquet(source.path).metadata.num_row_groups
            yield from (Part(source, index, group, group + 1, size // groups) for group in range(groups))
        elif source.kind == "jsonl" and source.compression is None:
            for start in range(0, size, unit_bytes):
                stop = min(start + unit_bytes, size)
                yield Part(source, index, start, stop, stop - start)
        else:
            yield Part(source, index, 0, 0, size)


def read_part(part: Part, text_field: str) -> Iterator[str | Rejected]:
    """The documents of a part, in order. Raises DataError when the container is broken."""
    if part.source.kind == "parquet":
        yield from _read_rows(part, text_field)
        return
    try:
        with open_bytes(part.source.path, part.source.compression) as file:
            if part.source.kind == "text":
                yield _decode_text(file.read())
            else:
                yield from _read_lines(part, file, text_field)
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{part.source.path}: corrupt or truncated gzip data ({error}); write the file again") from error


def describe(rejected: Rejected, part: Part, text_field: str) -> str:
    """One line for a user: the file, the line or row in the whole file, what is wrong and the remedy."""
    where = f"{part.source.path}, {'row' if part.source.kind == 'parquet' else 'line'} {_position_in_file(rejected, part)}"
    if rejected.reason is Reason.INVALID_UTF8:
        return f"{where}: text is not UTF-8 ({rejected.detail}); convert the file or pass --on-invalid skip"
    if rejected.reason is Reason.INVALID_JSON:
        return f"{where}: not a JSON object ({rejected.detail}); repair the line or pass --on-invalid skip"
    return f"{where}: no string in field {text_field!r} ({rejected.detail}); name the field with --text-field or pass --on-invalid skip"


def _position_in_file(rejected: Rejected, part: Part) -> int:
    """1-based line or row; lines before a byte range are counted only now, when somebody needs the number."""
    if part.source.kind == "parquet":
        metadata = open_parquet(part.source.path).metadata
        return rejected.position + sum(metadata.row_group(group).num_rows for group in range(part.start))
    before = 0
    if part.start:
        with open(part.source.path, "rb") as file:
            left = part.start
            while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                before += chunk.count(b"\n")
                left -= len(chunk)
            # A line that began before the range ends inside it, and is counted by the part before.
            file.seek(part.start - 1)
            before += file.read(1) != b"\n"
    return before + rejected.position


def _decode_text(content: bytes) -> str | Rejected:
    try:
        return content.removeprefix(UTF8_BOM).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Rejected(Reason.INVALID_UTF8, line, str(error))


def _read_lines(part: Part, file: BinaryIO, text_field: str) -> Iterator[str | Rejected]:
    import orjson

    position, stop = part.start, part.stop or None
    lines = split_lines(file)
    if part.start:
        # The line that holds the byte before the range belongs to the part before.
        file.seek(part.start - 1)
        position += len(next(lines, b""))
    for number, line in enumerate(lines, 1):
        if stop is not None and position >= stop:
            return
        if position == 0 and line[:3] == UTF8_BOM:
            line = line[3:]
            position = 3
        position += len(line) + 1
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            content = bytes(line)
            if content.strip():
                yield _reject_line(content, number, str(error))
            continue
        text = record.get(text_field) if isinstance(record, dict) else None
        if isinstance(text, str):
            yield text
        elif isinstance(record, dict):
            fields = ", ".join(map(str, list(record)[:8])) or "none"
            yield Rejected(Reason.MISSING_TEXT, number, f"it holds {type(text).__name__}" if text_field in record else f"fields: {fields}")
        else:
            yield Rejected(Reason.INVALID_JSON, number, f"it is a {type(record).__name__}")


def _reject_line(line: bytes, number: int, detail: str) -> Rejected:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        return Rejected(Reason.INVALID_UTF8, number, str(error))
    return Rejected(Reason.INVALID_JSON, number, detail)


def open_parquet(path: Path) -> pyarrow.parquet.ParquetFile:
    """Opens a parquet file. Raises DataError when the file is not parquet."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_first_line(error)}); write the file again") from error


def _read_rows(part: Part, text_field: str) -> Iterator[str | Rejected]:
    import pyarrow

    file = open_parquet(part.source.path)
    schema = file.schema_arrow
    if text_field not in schema.names:
        raise DataError(
            f"{part.source.path}: no column {text_field!r} (columns: {', '.join(schema.names)}); name the column with --text-field"
        )
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{part.source.path}: column {text_field!r} holds {kind}, not strings; name another column with --text-field")
    row = 0
    try:
        for batch in file.iter_batches(batch_size=256, row_groups=[part.start], columns=[text_field]):
            # Arrow does not check strings when it reads them, so they are decoded here, one by one.
            for content in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                row += 1
                if content is None:
                    yield Rejected(Reason.MISSING_TEXT, row, "it is null")
                    continue
                try:
                    yield content.decode()
                except UnicodeDecodeError as error:
                    yield Rejected(Reason.INVALID_UTF8, row, str(error))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{part.source.path}: corrupt parquet data ({_first_line(error)}); write the file again") from error


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]
