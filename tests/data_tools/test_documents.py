"""Readers: every format gives the same documents, units cover each line once, broken input is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import documents, streams
from data_tools.documents import Part, Reason, Rejected, describe, open_sources, plan_units, read_part
from data_tools.errors import DataError
from tests.data_tools.helpers import write_jsonl

TEXTS = ["one", "two\nlines", "", "naïve 中文 👍🏽 \u2028", "last"]


def parts_of(path: Path, unit_bytes: int = documents.UNIT_BYTES) -> list[Part]:
    return [part for unit in plan_units(open_sources([path]), unit_bytes) for part in unit.parts]


def read_all(path: Path, field: str = "text", unit_bytes: int = documents.UNIT_BYTES) -> list[str | Rejected]:
    return [text for part in parts_of(path, unit_bytes) for text in read_part(part, field)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "a.json.gz", "A.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    assert read_all(write_jsonl(tmp_path / name, TEXTS)) == TEXTS


def test_parquet_row_groups_are_units(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": range(5), "body": TEXTS}), path, row_group_size=2)
    assert len(parts_of(path)) == 3
    assert read_all(path, "body") == TEXTS


def test_parquet_null_and_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    strings = pyarrow.array([b"good", None, b"\xff\xfe", b"after"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), path, row_group_size=1)
    found = read_all(path)
    assert [found[0], found[3]] == ["good", "after"]
    assert [rejected.reason for rejected in found[1:3]] == [Reason.MISSING_TEXT, Reason.INVALID_UTF8]
    assert "row 3" in describe(found[2], parts_of(path)[2], "text")


@pytest.mark.parametrize(("name", "encode"), [("a.txt", bytes), ("a.md.gz", gzip.compress), ("a.rst.zst", zstandard.compress)])
def test_a_text_file_is_one_document(tmp_path: Path, name: str, encode: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(encode("\ufeffa b\n\nä\n".encode()))
    assert read_all(tmp_path / name) == ["a b\n\nä\n"]


def test_zstandard_with_several_frames_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "a"}\n\n{"te') + zstandard.compress(b'xt": "b"}\r\n  \n') + zstandard.compress(b""))
    assert read_all(path) == ["a", "b"]


def test_byte_order_mark_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}')
    assert read_all(path) == ["a", "b"]


@settings(max_examples=60)
@given(texts=st.lists(st.text(max_size=30), max_size=12), unit_bytes=st.integers(1, 90), newline=st.booleans(), buffer=st.integers(2, 64))
def test_units_cover_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], unit_bytes: int, newline: bool, buffer: int
) -> None:
    path = tmp_path_factory.mktemp("units") / "a.jsonl"
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + ("\n" if newline else "")
    path.write_bytes(content.encode(errors="replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "LINE_BUFFER_BYTES", buffer)
        assert read_all(path, unit_bytes=unit_bytes) == [text.encode(errors="replace").decode() for text in texts]


@pytest.mark.parametrize("unit_bytes", [7, 20, 33, 1000])
def test_line_numbers_do_not_depend_on_units(tmp_path: Path, unit_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "b"}\n{"text": "\xff"}\n{"text": 3}\nnonsense\n[1]\n{"body": "c"}\n')
    found = [
        describe(text, part, "text")
        for part in parts_of(path, unit_bytes)
        for text in read_part(part, "text")
        if isinstance(text, Rejected)
    ]
    expected = ["line 4: text is not UTF-8", "line 5: no string in field 'text' (it holds int)", "line 6: not a JSON object"]
    expected += ["line 7: not a JSON object (it is a list)", "line 8: no string in field 'text' (fields: body)"]
    assert len(found) == len(expected)
    for message, words in zip(found, expected, strict=True):
        assert message.startswith(f"{path}, {words}")


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nfine\nnot \xe9 fine\n")
    (rejected,) = read_all(path)
    assert "a.txt, line 3: text is not UTF-8" in describe(rejected, parts_of(path)[0], "text")


@pytest.mark.parametrize("cut", ["truncated", "flipped"])
@pytest.mark.parametrize(("name", "encode"), [("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
def test_corrupt_compressed_data(tmp_path: Path, name: str, encode: Callable[[bytes], bytes], cut: str) -> None:
    lines = b"".join(json.dumps({"text": f"{index * 7919 % 10007}"}).encode() + b"\n" for index in range(5000))
    content = bytearray(encode(lines))
    if cut == "truncated":
        content = content[:-20]
    else:
        content[len(content) // 2] ^= 0xFF
        content[2] ^= 0xFF
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: (corrupt|truncated) .*write the file again"):
        read_all(tmp_path / name)


def test_corrupt_parquet_and_wrong_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(DataError, match="a.parquet: not a readable parquet file"):
        read_all(path)
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": range(5)}), path)
    with pytest.raises(DataError, match=r"no column 'text' \(columns: body, n\); name the column with --text-field"):
        read_all(path)
    with pytest.raises(DataError, match="column 'n' holds int64, not strings"):
        read_all(path, "n")


@pytest.mark.parametrize("name", ["a.csv", "a.parquet.gz", "a.gz", "missing.jsonl", "folder.jsonl"])
def test_unusable_names(tmp_path: Path, name: str) -> None:
    if name == "folder.jsonl":
        (tmp_path / name).mkdir()
    elif name != "missing.jsonl":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=name):
        open_sources([tmp_path / name])


def test_small_files_share_a_unit(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{index}.jsonl", [f"text {index}"]) for index in range(30)]
    assert len(plan_units(open_sources(paths))) == 1
    units = plan_units(open_sources(paths), unit_bytes=100)
    assert 5 < len(units) < 30
    assert [text for unit in units for part in unit.parts for text in read_part(part, "text")] == [f"text {index}" for index in range(30)]
