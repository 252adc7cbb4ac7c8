"""Training: standard files that both libraries load, the same bytes again, skipped when already there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_tools.errors import DataError
from data_tools.tokenizer import load_tokenizer, train_tokenizer
from tests.data_tools.helpers import assert_clear_error, folder_bytes, run, write_jsonl


def test_transformers_loads_the_folder(tokenizer: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    text = "def f(x): return x  # naïve 中文"
    expected = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(text).ids
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = kind.from_pretrained(tokenizer)
        assert loaded(text)["input_ids"] == expected
        assert loaded.decode(expected) == text
        assert (loaded.eos_token, loaded.eos_token_id) == ("<|endoftext|>", 0)
        assert len(loaded) == 600


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, tokenizer: Path, texts: list[str]) -> None:
    assert train_tokenizer([write_jsonl(tmp_path / "corpus.jsonl", texts)], 600, tmp_path / "again")
    assert folder_bytes(tmp_path / "again") == folder_bytes(tokenizer)


def test_skips_what_is_there_and_does_not_overwrite(tmp_path: Path, texts: list[str]) -> None:
    corpus, output = write_jsonl(tmp_path / "c.jsonl.gz", texts), tmp_path / "tokenizer"
    arguments = ("train-tokenizer", "--input", corpus, "--output", output, "--vocab-size")
    assert "trained" in run(*arguments, 300).stdout
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    again = run(*arguments, 300)
    assert again.returncode == 0
    assert "already there" in again.stdout
    assert_clear_error(run(*arguments, 301), output, "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    assert run(*arguments, 301, "--overwrite").returncode == 0
    assert load_tokenizer(output).vocab_size == 301
    (output / "training.json").unlink()
    assert_clear_error(run(*arguments, 301), "tokenizer.json was not written by train-tokenizer", "--overwrite")


def test_more_special_tokens(tmp_path: Path, texts: list[str]) -> None:
    train_tokenizer([write_jsonl(tmp_path / "c.jsonl", texts)], 400, tmp_path / "t", special_tokens=("<|user|>", "<|bot|>"))
    vocabulary = Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json")).get_vocab()
    assert [vocabulary[token] for token in ("<|endoftext|>", "<|user|>", "<|bot|>")] == [0, 1, 2]


def test_a_small_corpus_gives_a_smaller_vocabulary_and_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tokenizer([write_jsonl(tmp_path / "c.jsonl", ["abc abc"])], 5000, tmp_path / "t")
    assert "fewer than --vocab-size 5000" in capsys.readouterr().err
    assert 257 < load_tokenizer(tmp_path / "t").vocab_size < 270


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--vocab-size 256 is too small"):
        train_tokenizer([write_jsonl(tmp_path / "a.jsonl", ["a"])], 256, tmp_path / "t")
    with pytest.raises(DataError, match="empty corpus: no text in .*empty.jsonl"):
        train_tokenizer([write_jsonl(tmp_path / "empty.jsonl", [])], 300, tmp_path / "t")
    with pytest.raises(DataError, match=r"a.jsonl, line 1: no string in field 'body' \(fields: id, text\)"):
        train_tokenizer([tmp_path / "a.jsonl"], 300, tmp_path / "t", text_field="body")
    assert not (tmp_path / "t").exists()


def test_end_of_document_token(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes((tokenizer / "tokenizer.json").read_bytes())
    assert load_tokenizer(path).eod_id == 0
    assert load_tokenizer(tmp_path, eod_token="A").eod_token == "A"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "B"}}))
    assert load_tokenizer(tmp_path).eod_token == "B"
    with pytest.raises(DataError, match=r"no end-of-document token \(</x>\) in the vocabulary; name one with --eod-token"):
        load_tokenizer(tmp_path, eod_token="</x>")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"model": {}}', b'{"model": {"vocab": {}}}'])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match="tokenizer.json: not a tokenizer.json"):
        load_tokenizer(tmp_path)
