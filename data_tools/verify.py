"""Proof that a shards folder is what `tokenize` wrote: every byte of every file, and no file more.

The manifest proves itself by its checksum and proves the rest: size and SHA-256 of each shard and of the tokenizer.
A plain tar reader would not notice: webdataset ends a shard early and in silence at a damaged header, and a flipped
bit in the tokens is just another token.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_tools.errors import DataError, ManifestError
from data_tools.files import sha256_file
from data_tools.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest
from data_tools.progress import Progress


@dataclass(frozen=True)
class Finding:
    """A file that is not as it should be."""

    file: str
    """Name inside the shards folder."""
    problem: str


def verify(directory: Path, threads: int = 1) -> list[Finding]:
    """Reads everything and returns what is wrong, in the order of names; an empty list means that nothing is.

    Raises DataError when `directory` is not a folder.
    """
    if not directory.is_dir():
        raise DataError(f"{directory} is not a folder: name the --output of tokenize")
    try:
        manifest = Manifest.load(directory)
    except ManifestError as error:
        return [Finding(MANIFEST_NAME, str(error))]
    expected = {shard.name: (shard.size, shard.sha256) for shard in manifest.shards}
    expected[TOKENIZER_NAME] = (None, manifest.tokenizer_sha256)
    findings = []
    with Progress("verify", sum(shard.size for shard in manifest.shards)) as progress, ThreadPoolExecutor(threads) as pool:
        checks = pool.map(lambda name: _check(directory / name, *expected[name]), expected)
        for name, problem in zip(expected, checks, strict=True):
            progress.update(expected[name][0] or 0)
            if problem:
                findings.append(Finding(name, problem))
    known = {MANIFEST_NAME, *expected}
    findings += [
        Finding(path.name, "foreign: the manifest does not know this file") for path in directory.iterdir() if path.name not in known
    ]
    return sorted(findings, key=lambda finding: finding.file)


def _check(path: Path, size: int | None, sha256: str) -> str | None:
    if not path.is_file():
        return "missing"
    found = path.stat().st_size
    if size is not None and found != size:
        return f"{found} bytes instead of {size}: truncated, extended or swapped"
    if sha256_file(path) != sha256:
        return "content has changed: SHA-256 differs from the manifest's"
    return None
