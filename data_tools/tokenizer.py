"""Tokenizers: loading any released `tokenizer.json`, and training a byte-level BPE.

A trained tokenizer is what GPT-2's is: bytes mapped to printable characters, text cut by GPT-2's pattern, merges
learned by frequency. Every encoder of backends.py understands it, it can represent any text, and id 0 is the
end-of-document token. The folder loads with `tokenizers.Tokenizer.from_file` and `transformers.AutoTokenizer`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import orjson

from data_tools.documents import Rejected, Source, describe, open_sources, plan_units, read_part
from data_tools.errors import DataError
from data_tools.files import fingerprint, write_atomically
from data_tools.progress import Progress, warn

TRAINING_FORMAT_VERSION = 1
END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_END_TOKENS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")
TRAINING_RECORD = "training.json"


@dataclass(frozen=True)
class TokenizerFile:
    """A `tokenizer.json` and what the shards need to know about it."""

    path: Path
    content: str
    sha256: str
    """Of the file's bytes."""
    vocab_size: int
    """Largest token id + 1, added tokens included: the number of rows an embedding needs."""
    eod_token: str
    eod_id: int


def load_tokenizer(path: Path, eod_token: str | None = None) -> TokenizerFile:
    """Reads a `tokenizer.json`, or the folder that holds one.

    The end-of-document token is `eod_token`, else `eos_token` of the `tokenizer_config.json` beside the file, else
    the first well-known one in the vocabulary. Raises DataError.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist: pass --tokenizer a tokenizer.json or the folder that holds one")
    content = path.read_bytes()
    try:
        definition = orjson.loads(content)
        vocabulary = definition["model"]["vocab"]
        if isinstance(vocabulary, list):
            # A Unigram model lists [token, score]; the position is the id.
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        vocabulary = vocabulary | {token["content"]: token["id"] for token in definition.get("added_tokens") or ()}
        vocab_size = max(vocabulary.values()) + 1
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: not a tokenizer.json ({problem}); pass --tokenizer a file that the tokenizers library wrote") from error
    candidates = (eod_token,) if eod_token else (_configured_end_token(path.parent), *KNOWN_END_TOKENS)
    found = next((token for token in candidates if token in vocabulary), None)
    if found is None:
        names = ", ".join(str(token) for token in candidates if token)
        raise DataError(f"{path}: no end-of-document token ({names}) in the vocabulary; name one with --eod-token")
    return TokenizerFile(path, content.decode(), hashlib.sha256(content).hexdigest(), vocab_size, found, vocabulary[found])


def _configured_end_token(folder: Path) -> str | None:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise DataError(f"{path}: not a JSON object ({error}); repair it or pass --eod-token") from error
    return token.get("content") if isinstance(token, dict) else token


def train_tokenizer(
    inputs: list[Path],
    vocab_size: int,
    output: Path,
    text_field: str = "text",
    special_tokens: tuple[str, ...] = (),
    overwrite: bool = False,
    on_invalid: str = "error",
) -> bool:
    """Trains a byte-level BPE of `vocab_size` ids on the documents of `inputs` and writes it to the folder `output`.

    Special tokens get the first ids: end of document (0), then `special_tokens`. Returns False when the folder
    already holds the result of the same training. Raises DataError for bad input, and for a folder that holds
    another tokenizer unless `overwrite`. on_invalid: "error", or "skip" to leave out documents that cannot be used.
    """
    specials = [END_OF_DOCUMENT, *(token for token in special_tokens if token != END_OF_DOCUMENT)]
    if vocab_size < 256 + len(specials):
        raise DataError(f"--vocab-size {vocab_size} is too small: 256 bytes and {len(specials)} special tokens need {256 + len(specials)}")
    sources = open_sources(inputs)
    record = {
        "format_version": TRAINING_FORMAT_VERSION,
        "vocab_size": vocab_size,
        "special_tokens": specials,
        "text_field": text_field,
        "on_invalid": on_invalid,
        "sources": [{"name": source.path.name, "fingerprint": fingerprint(source.path)} for source in sources],
        "versions": {"tokenizers": version("tokenizers")},
    }
    if _already_trained(output, record, overwrite):
        return False

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_training_documents(sources, text_field, on_invalid), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        warn(f"the corpus supports {tokenizer.get_vocab_size()} ids, fewer than --vocab-size {vocab_size}; more text gives more")
    content = tokenizer.to_str(pretty=True).encode()
    record["tokenizer_sha256"] = hashlib.sha256(content).hexdigest()
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "tokenizer.json", content)
    tokens = {"bos_token": END_OF_DOCUMENT, "eos_token": END_OF_DOCUMENT, "unk_token": END_OF_DOCUMENT}
    extra = {"additional_special_tokens": specials[1:]} if specials[1:] else {}
    config = {**tokens, **extra, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(output / "tokenizer_config.json", config)
    _write_json(output / "special_tokens_map.json", {**tokens, **extra})
    _write_json(output / TRAINING_RECORD, record)
    return True


def _training_documents(sources: list[Source], text_field: str, on_invalid: str) -> Iterator[str]:
    units = plan_units(sources)
    documents = 0
    with Progress("train-tokenizer", sum(unit.input_bytes for unit in units)) as progress:
        for unit in units:
            for part in unit.parts:
                for text in read_part(part, text_field):
                    if isinstance(text, Rejected):
                        if on_invalid == "error":
                            raise DataError(describe(text, part, text_field))
                        continue
                    documents += bool(text)
                    yield text
            progress.update(unit.input_bytes)
    if not documents:
        raise DataError(f"empty corpus: no text in {', '.join(str(source.path) for source in sources)}; check --input and --text-field")


def _already_trained(output: Path, record: dict, overwrite: bool) -> bool:
    if output.exists() and not output.is_dir():
        raise DataError(f"--output {output} is a file: name a folder")
    path = output / TRAINING_RECORD
    tokenizer = output / "tokenizer.json"
    if path.is_file() and tokenizer.is_file():
        try:
            found = json.loads(path.read_bytes())
        except (UnicodeDecodeError, json.JSONDecodeError):
            found = None
        if found == {**record, "tokenizer_sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest()}:
            return True
    if tokenizer.exists() and path.is_file() is False and not overwrite:
        raise DataError(f"{tokenizer} was not written by train-tokenizer: choose another --output or pass --overwrite")
    if path.is_file() and not overwrite:
        raise DataError(f"{output} holds a tokenizer of another training (see {path.name}): choose another --output or pass --overwrite")
    return False


def _write_json(path: Path, value: dict) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
