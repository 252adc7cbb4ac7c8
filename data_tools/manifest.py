"""`manifest.json`: what a shards directory holds, and the proof that it is what was written.

The file is a function of the job alone (inputs, tokenizer, options), never of the worker count, the time or the
place, so two runs of a job give the same bytes:

    format_version            1
    job                       SHA-256 of everything that the tokens depend on
    tokenizer                 file, sha256, vocab_size (largest id + 1), eod_token, eod_id
    dtype                     uint16 or uint32, little-endian on disk
    options, sources, filters, backend
    shards                    name, split, size (bytes), sha256, documents, tokens, and for each block of the tar the
                              byte offsets of its two members: [tokens_offset, num_tokens, lens_offset, num_documents]
    checksum                  SHA-256 of the canonical JSON of all the above

`tokens` counts the end-of-document token that follows each document; so do the document lengths in `lens.u32`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import ManifestError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
SPLITS = ("train", "validation")
MEMBER_SUFFIX = {"uint16": "u16", "uint32": "u32"}
ITEM_BYTES = {"uint16": 2, "uint32": 4}


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    split: str
    size: int
    """Bytes."""
    sha256: str
    documents: int
    tokens: int
    """End-of-document tokens included."""
    blocks: tuple[tuple[int, int, int, int], ...]
    """Per block: byte offset of the tokens in the tar, number of tokens, byte offset of the lengths, number of documents."""


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been read and checked; `Manifest.load(directory)` is the way to get one."""

    directory: Path
    digest: str
    """SHA-256 of the canonical content, 64 hexadecimal digits."""
    content: dict[str, Any]
    """The parsed file without its checksum."""
    shards: tuple[Shard, ...]

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Reads `directory`/manifest.json. Raises ManifestError when it is missing, damaged, or of another format."""
        directory = Path(directory)
        path = directory / MANIFEST_NAME
        if directory.is_file():
            raise ManifestError(f"{directory} is a file: name the shards directory, where {MANIFEST_NAME} and the shards lie")
        if not path.is_file():
            state = "is not finished" if directory.is_dir() else "does not exist"
            raise ManifestError(
                f"{path} is missing, the shards directory {state}: run `python -m data_tools tokenize --output {directory}`"
            )
        raw = path.read_bytes()
        damaged = f"{path} is damaged or was edited by hand: restore it, or run tokenize again with --overwrite"
        try:
            content = json.loads(raw)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ManifestError(f"{damaged} (not JSON: {error})") from error
        if not isinstance(content, dict):
            raise ManifestError(f"{damaged} (not a JSON object)")
        version = content.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ManifestError(f"{path}: format_version is {version}, this release reads up to {FORMAT_VERSION}: upgrade megatron-qsparse")
        if not isinstance(content.get("shards"), list):
            raise ManifestError(f"{damaged} (field shards is missing or not a list)")
        content.pop("checksum", None)
        # The bytes are compared, not only the checksum: a flipped bit in white space is damage as well.
        if encode_manifest(content) != raw:
            raise ManifestError(f"{damaged} (field checksum does not match)")
        return cls._checked(directory, content)

    @classmethod
    def _checked(cls, directory: Path, content: dict[str, Any]) -> Manifest:
        path = directory / MANIFEST_NAME
        fields = {"format_version": int, "job": str, "tokenizer": dict, "dtype": str, "options": dict, "sources": list, "filters": dict}
        for field, kind in {**fields, "backend": dict, "shards": list}.items():
            if not isinstance(content.get(field), kind):
                raise ManifestError(f"{path}: field {field} is missing or not a {kind.__name__}: run tokenize again with --overwrite")
        if content["format_version"] != FORMAT_VERSION:
            raise ManifestError(f"{path}: format_version {content['format_version']} is unknown: run tokenize again with --overwrite")
        if content["dtype"] not in ITEM_BYTES:
            raise ManifestError(
                f"{path}: field dtype is {content['dtype']!r}, not one of {', '.join(ITEM_BYTES)}: run tokenize again with --overwrite"
            )
        for field, kind in {"sha256": str, "vocab_size": int, "eod_id": int}.items():
            if not isinstance(content["tokenizer"].get(field), kind):
                raise ManifestError(
                    f"{path}: field tokenizer.{field} is missing or not a {kind.__name__}: run tokenize again with --overwrite"
                )
        shards = []
        for index, entry in enumerate(content["shards"]):
            try:
                shards.append(Shard(**{**entry, "blocks": tuple(tuple(block) for block in entry["blocks"])}))
            except (TypeError, KeyError) as error:
                raise ManifestError(f"{path}: field shards[{index}] is malformed ({error}): run tokenize again with --overwrite") from error
        return cls(directory, checksum(content), content, tuple(shards))

    @property
    def vocab_size(self) -> int:
        """Largest token id of the tokenizer + 1."""
        return self.content["tokenizer"]["vocab_size"]

    @property
    def eod_id(self) -> int:
        """The id that ends each document."""
        return self.content["tokenizer"]["eod_id"]

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer.json, a copy of which lies beside the manifest."""
        return self.content["tokenizer"]["sha256"]

    @property
    def dtype(self) -> str:
        """`uint16` or `uint32`."""
        return self.content["dtype"]

    @functools.cached_property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that hold at least one shard."""
        return tuple(split for split in SPLITS if any(shard.split == split for shard in self.shards))

    def shards_of(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split in their written order. Raises ManifestError for a split that is not there."""
        found = tuple(shard for shard in self.shards if shard.split == split)
        if not found:
            remedy = " (tokenize again with a larger --validation-fraction)" if split == "validation" else ""
            raise ManifestError(f"{self.directory / MANIFEST_NAME}: no split {split!r}, there is: {', '.join(self.splits)}{remedy}")
        return found

    def tokens(self, split: str) -> int:
        """Number of tokens of a split, end-of-document tokens included."""
        return sum(shard.tokens for shard in self.shards_of(split))

    def documents(self, split: str) -> int:
        """Number of documents of a split."""
        return sum(shard.documents for shard in self.shards_of(split))

    def check_sizes(self, split: str) -> None:
        """Raises ManifestError when a shard of the split is missing or has another size than recorded."""
        for shard in self.shards_of(split):
            path = self.directory / shard.name
            remedy = f"copy it again and run `python -m data_tools verify {self.directory}`"
            if not path.is_file():
                raise ManifestError(f"shard {path} is missing: {remedy}")
            size = path.stat().st_size
            if size != shard.size:
                raise ManifestError(f"shard {path} has {size} bytes, {MANIFEST_NAME} says {shard.size}: {remedy}")


def block_members(shard_name: str, block: int, dtype: str) -> tuple[str, str]:
    """Names of the two tar members of a block: `KEY.tokens.u16` (or u32) and `KEY.lens.u32`."""
    key = f"{Path(shard_name).stem}-{block:05d}"
    return f"{key}.tokens.{MEMBER_SUFFIX[dtype]}", f"{key}.lens.u32"


def checksum(content: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON (sorted keys, no spaces) of a manifest without its checksum."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def encode_manifest(content: dict[str, Any]) -> bytes:
    """The bytes of manifest.json: readable, one shard a line, the checksum last."""
    parts = []
    for key, value in {**content, "checksum": checksum(content)}.items():
        if key == "shards":
            lines = ",\n".join("  " + json.dumps(shard, ensure_ascii=False) for shard in value)
            parts.append(f' "shards": [\n{lines}\n ]')
        else:
            text = json.dumps(value, ensure_ascii=False, indent=1).replace("\n", "\n ")
            parts.append(f" {json.dumps(key)}: {text}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()


def shard_entry(shard: Shard) -> dict[str, Any]:
    """A shard as it stands in manifest.json."""
    return asdict(shard)
