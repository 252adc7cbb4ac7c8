"""Encoders: all give the ids of `tokenizers`; special tokens' spellings stay text; one that disagrees is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from data_tools import backends
from data_tools.backends import BACKENDS, DIFFICULT_TEXTS, BackendUnavailable, GigatokenEncoder, TiktokenEncoder, choose_backend
from data_tools.errors import DataError
from data_tools.tokenizer import TokenizerFile, load_tokenizer
from tests.data_tools.helpers import tokenize_here, write_jsonl

LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("name", BACKENDS)
def test_ids_are_those_of_the_library_called_literally(name: str, tokenizer: Path, texts: list[str]) -> None:
    reference = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    encoder = BACKENDS[name].load(load_tokenizer(tokenizer))
    for text in [*texts, *DIFFICULT_TEXTS]:
        ids = encoder.encode(text)
        assert ids.dtype == np.uint32
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", BACKENDS)
def test_special_token_text_stays_text(name: str, tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    encoder = BACKENDS[name].load(loaded)
    reference = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for text in ("<|endoftext|>", "a<|endoftext|>b", "<|endoftext|><|endoftext|>", "<|endof<|endoftext|>text|>"):
        ids = encoder.encode(text).tolist()
        assert loaded.eod_id not in ids
        assert reference.decode(ids, skip_special_tokens=False) == text
        assert loaded.eod_id in reference.encode(text).ids, "the library itself would have made it the end of a document"


@settings(max_examples=150)
@given(text=st.text(max_size=80))
def test_backends_agree_on_any_text(tokenizer: Path, text: str) -> None:
    loaded = load_tokenizer(tokenizer)
    expected = BACKENDS["tokenizers"].load(loaded).encode(text).tolist()
    assert BACKENDS["gigatoken"].load(loaded).encode(text).tolist() == expected
    assert BACKENDS["tiktoken"].load(loaded).encode(text).tolist() == expected


def trained(folder: Path, tokenizer: Tokenizer, trainer: trainers.Trainer, texts: list[str]) -> Path:
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def bpe(vocab_size: int = 500, **options: object) -> trainers.BpeTrainer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, **{"special_tokens": ["</s>"], **options}
    )


def test_llama3_kind_of_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    loaded = load_tokenizer(trained(tmp_path, tokenizer, bpe(), texts))
    for name in BACKENDS:
        assert choose_backend(loaded, name, texts).name == name


def test_tokenizers_that_only_the_reference_supports(tmp_path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "</s>"], show_progress=False)
    loaded = load_tokenizer(trained(tmp_path, tokenizer, trainer, texts))
    assert choose_backend(loaded, "auto", texts).name == "tokenizers"
    with pytest.raises(DataError, match="--backend gigatoken: .*pass --backend auto"):
        choose_backend(loaded, "gigatoken", texts)


def test_tiktoken_refuses_what_it_cannot_do(tmp_path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(BackendUnavailable, match="prefix space"):
        TiktokenEncoder(load_tokenizer(trained(tmp_path, tokenizer, bpe(), texts)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(BackendUnavailable, match="normalize"):
        TiktokenEncoder(load_tokenizer(trained(tmp_path, tokenizer, bpe(), texts)))
    tokenizer.normalizer = None
    path = trained(tmp_path, tokenizer, bpe(), texts) / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["merges"].reverse()
    path.write_text(json.dumps(definition))
    with pytest.raises(BackendUnavailable, match="order of the merges"):
        TiktokenEncoder(load_tokenizer(path))


def test_an_encoder_that_disagrees_is_passed_over_with_a_warning(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(GigatokenEncoder):
        def __init__(self, tokenizer_file: TokenizerFile) -> None:
            super().__init__(tokenizer_file)
            right = self.encode
            self.encode = lambda text: right(text.replace("unusual", "usual"))

    loaded = load_tokenizer(tokenizer)
    monkeypatch.setitem(backends.BACKENDS, "gigatoken", backends.Backend("gigatoken", Wrong))
    assert choose_backend(loaded, "auto", ["a usual text"]).name == "gigatoken"
    assert capsys.readouterr().err == ""
    assert choose_backend(loaded, "auto", ["a usual text", "an unusual text"]).name == "tiktoken"
    assert "warning: gigatoken disagrees with tokenizers on 'an unusual text'" in capsys.readouterr().err
    with pytest.raises(DataError, match="gigatoken disagrees with tokenizers"):
        choose_backend(loaded, "gigatoken", ["an unusual text"])


class PanicException(BaseException):
    """Stands in for PyO3's class of this name, which no module exports."""


@pytest.mark.parametrize("moment", ["loading", "encoding"])
def test_a_panic_makes_an_encoder_unavailable(tokenizer: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    class Panicking:
        error: type[BaseException] = PanicException

        def __init__(self, tokenizer_file: TokenizerFile) -> None:
            if moment == "loading":
                raise self.error("index out of bounds")

        def encode(self, text: str) -> np.ndarray:
            raise self.error("index out of bounds")

    loaded = load_tokenizer(tokenizer)
    monkeypatch.setitem(backends.BACKENDS, "gigatoken", backends.Backend("gigatoken", Panicking))
    assert choose_backend(loaded, "auto", []).name == "tiktoken"
    with pytest.raises(DataError, match=r"--backend gigatoken: .*panicked \(index out of bounds\); pass --backend auto"):
        choose_backend(loaded, "gigatoken", [])
    for error in (KeyboardInterrupt, SystemExit):
        Panicking.error = error
        with pytest.raises(error):
            choose_backend(loaded, "auto", [])


def test_a_panic_in_the_middle_of_a_corpus_is_an_error_in_words(
    tmp_path: Path, tokenizer: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panicking(GigatokenEncoder):
        def __init__(self, tokenizer_file: TokenizerFile) -> None:
            super().__init__(tokenizer_file)
            right = self.encode
            self.encode = lambda text: right(text) if text != texts[-1] else self.panic()

        def panic(self) -> None:
            raise PanicException("index out of bounds")

    monkeypatch.setitem(backends.BACKENDS, "gigatoken", backends.Backend("gigatoken", Panicking))
    with pytest.raises(DataError, match=r"gigatoken .*panicked \(index out of bounds\); pass another --backend"):
        tokenize_here([write_jsonl(tmp_path / "c.jsonl", texts)], tokenizer, tmp_path / "out")


def test_backends_that_are_not_installed(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tokenizer(tokenizer)
    backends._load.cache_clear()
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert choose_backend(loaded, "auto", []).name == "tokenizers"
    with pytest.raises(DataError, match="tiktoken is not installed"):
        choose_backend(loaded, "tiktoken", [])
