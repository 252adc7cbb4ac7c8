"""Encoders for one tokenizer.json: gigatoken (fastest), tiktoken, tokenizers (the reference).

All three promise `encode(text) -> ids [num_tokens] uint32` with text as nothing but text: no token is added around
it, and the spelling of a special token inside a document (`<|endoftext|>` in a page about tokenizers) is encoded
like any other characters, never as the special id.

A fast encoder is used only after it has given the reference's ids for texts chosen to be difficult and for the
first documents of the corpus itself; see `choose_backend`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import orjson

from data_tools.errors import DataError
from data_tools.progress import warn
from data_tools.tokenizer import TokenizerFile

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
DIFFICULT_TEXTS = (
    "",
    " ",
    "\n\n\n  x\t\t\r\n y \r z",
    "it's we've I'LL they're O'Neill's don''t",
    "naïve café ﬁ ½ Ⅷ ０１２ ٣٤ İıſß ʼn",
    "中文字符 日本語テキスト 한국어 ไทย हिन्दी עברית العربية",
    "e\u0301 a\u0308\u0323 \u200d\u200b\u00a0\u3000\u2028\u0085\ufeff \x00\x01\x7f",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 👍🏽",
    "for (int i=0;i<10;++i){a[i]+=1.5e-10;} // 1234567890 0xDEADBEEF",
    '    def f(self, *args, **kwargs) -> None:\n\t\treturn "\\n"  \n',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)


class Encoder(Protocol):
    """Encodes text, and nothing but text, into ids [num_tokens] uint32."""

    def encode(self, text: str) -> np.ndarray: ...


class BackendUnavailable(Exception):
    """The library is not installed, or does not support this tokenizer.json."""


class TokenizersEncoder:
    """The reference: the `tokenizers` library told to read special tokens as text."""

    def __init__(self, tokenizer: TokenizerFile) -> None:
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_str(tokenizer.content)
        except Exception as error:
            # The library raises nothing more specific, for a definition that it does not understand.
            raise DataError(f"{tokenizer.path}: tokenizers {version('tokenizers')} cannot load it ({_short(error)})") from error
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


class GigatokenEncoder:
    """gigatoken on the same file without its special tokens, which it would otherwise recognize inside text.

    `Tokenizer.encode` is used, document by document: its batch calls need the awkward library, whose import costs
    more than the call overhead that they save on documents of natural length.
    """

    def __init__(self, tokenizer: TokenizerFile) -> None:
        if find_spec("gigatoken") is None:
            raise BackendUnavailable("gigatoken is not installed")
        from gigatoken import Tokenizer

        definition = orjson.loads(tokenizer.content)
        definition["added_tokens"] = [token for token in definition.get("added_tokens") or () if not token.get("special")]
        definition["post_processor"] = None
        definition["truncation"] = definition["padding"] = None
        try:
            self.encode = Tokenizer.from_json(orjson.dumps(definition)).backend.encode
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            raise BackendUnavailable(f"gigatoken does not support this tokenizer ({_short(error)})") from error


class TiktokenEncoder:
    """tiktoken with the merges of a byte-level BPE as ranks; only where ids grow in the order of the merges."""

    def __init__(self, tokenizer: TokenizerFile) -> None:
        if find_spec("tiktoken") is None:
            raise BackendUnavailable("tiktoken is not installed")
        import tiktoken

        definition = orjson.loads(tokenizer.content)
        ranks, pattern = _mergeable_ranks(definition), _split_pattern(definition)
        self.encoding = tiktoken.Encoding("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        return self.encoding.encode_to_numpy(text, allowed_special=frozenset(), disallowed_special=frozenset())


def _split_pattern(definition: dict) -> str:
    """The regular expression that cuts text before merging, of GPT-2's or of Llama 3's kind of pre-tokenizer."""
    if definition.get("normalizer"):
        raise BackendUnavailable("tiktoken cannot normalize text")
    steps = definition.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers") or [steps]
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in steps):
        raise BackendUnavailable("tiktoken cannot add a prefix space")
    if len(steps) == 1 and steps[0].get("type") == "ByteLevel" and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if len(steps) == 2 and steps[0].get("type") == "Split" and steps[1].get("type") == "ByteLevel" and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        if pattern and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return pattern
    raise BackendUnavailable("tiktoken does not know this pre-tokenizer")


def _mergeable_ranks(definition: dict) -> dict[bytes, int]:
    model = definition.get("model", {})
    added = definition.get("added_tokens") or []
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise BackendUnavailable("tiktoken supports byte-level BPE only")
    if any(not token.get("special") for token in added):
        raise BackendUnavailable("tiktoken cannot match added tokens in text")
    specials = {token["content"] for token in added}
    byte_of = _byte_of_character()
    try:
        ranks = {bytes(byte_of[c] for c in token): index for token, index in model["vocab"].items() if token not in specials}
    except KeyError as error:
        raise BackendUnavailable(f"tiktoken supports byte-level BPE only (character {error} in the vocabulary)") from error
    order = [model["vocab"].get("".join(merge.split(" ", 1) if isinstance(merge, str) else merge)) for merge in model["merges"]]
    if None in order or any(first >= second for first, second in zip(order, order[1:], strict=False)):
        raise BackendUnavailable("tiktoken needs ids in the order of the merges")
    return ranks


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 is itself, the rest follows from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


@dataclass(frozen=True)
class Backend:
    """An encoder's name, its class, and the distributions whose versions the manifest records."""

    name: str
    encoder: Callable[[TokenizerFile], Encoder]

    def load(self, tokenizer: TokenizerFile) -> Encoder:
        """The encoder for a tokenizer, loaded once in each process. Raises BackendUnavailable."""
        return _load(self.encoder, tokenizer)

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that decide the ids: this one and the reference."""
        return {name: version(name) for name in sorted({self.name, "tokenizers"})}


@functools.lru_cache(maxsize=4)
def _load(encoder: Callable[[TokenizerFile], Encoder], tokenizer: TokenizerFile) -> Encoder:
    return encoder(tokenizer)


BACKENDS = {
    "gigatoken": Backend("gigatoken", GigatokenEncoder),
    "tiktoken": Backend("tiktoken", TiktokenEncoder),
    "tokenizers": Backend("tokenizers", TokenizersEncoder),
}


@contextlib.contextmanager
def panics_as(kind: type[Exception], name: str, remedy: str = "") -> Iterator[None]:
    """Turns a panic of the library `name`, written in Rust, into an exception of the given kind.

    PyO3 raises panics as PanicException, derived from BaseException and importable from nowhere.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{name} {version(name)} panicked ({_short(error)}){remedy}") from error


def choose_backend(tokenizer: TokenizerFile, requested: str, documents: Iterable[str]) -> Backend:
    """The fastest encoder that agrees with `tokenizers` on `documents` and on texts chosen to be difficult.

    `requested`: `auto` or the name of one. With `auto` an encoder that disagrees is passed over with a warning;
    one that was asked for by name and cannot be used is a DataError.
    """
    specials = [token["content"] for token in orjson.loads(tokenizer.content).get("added_tokens") or ()]
    texts = [*DIFFICULT_TEXTS, *(f"a{token}b {token}\n{token}{token}" for token in specials[:64]), *documents]
    reference = TokenizersEncoder(tokenizer)
    expected = [reference.encode(text) for text in texts]
    for name, backend in BACKENDS.items():
        if requested not in ("auto", name):
            continue
        if name == "tokenizers":
            return backend
        try:
            with panics_as(BackendUnavailable, name):
                encoder = backend.load(tokenizer)
                pairs = zip(texts, expected, strict=True)
                wrong = next((text for text, ids in pairs if not np.array_equal(encoder.encode(text), ids)), None)
        except BackendUnavailable as reason:
            problem = str(reason)
        else:
            if wrong is None:
                return backend
            problem = f"{name} disagrees with tokenizers on {_short(wrong)!r}"
            if requested == "auto":
                warn(f"{problem}; a slower backend is used")
        if requested == name:
            raise DataError(f"--backend {name}: {problem}; pass --backend auto")
    raise DataError(f"--backend {requested}: unknown; choose auto, {', '.join(BACKENDS)}")


def _short(value: object) -> str:
    text = str(value).split("\n", 1)[0]
    return text if len(text) <= 60 else text[:57] + "..."
