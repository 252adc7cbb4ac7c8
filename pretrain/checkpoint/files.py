"""The listing of a checkpoint's files, files.json: made when all is written, compared when something is read."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from data_tools.files import sync

FORMAT_VERSION = 2
"""1: without `created`."""
FILES_NAME = "files.json"
MEANING = (
    "This list of a checkpoint's files and their checksums, written last, tells that the checkpoint is whole: restore it from a copy, or "
    "move the checkpoint away"
)
HASHING_THREADS = 4
CHUNK_BYTES = 8 << 20


class Record(Protocol):
    """What a writer knows of a file that it has written durably."""

    size: int
    sha256: str


def seal(directory: Path, written: Mapping[str, Record]) -> None:
    """Write files.json and make all of the directory durable. written: files (by relative name) that are durable and hashed already.

    Raises OSError where one of those has another size than it was written with.
    """
    listing = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name, record = str(path.relative_to(directory)), written.get(str(path.relative_to(directory)))
        size = path.stat().st_size
        if record is None:
            sync(path)
            listing[name] = {"size": size, "sha256": sha256(path)}
        elif size == record.size:
            listing[name] = {"size": record.size, "sha256": record.sha256}
        else:
            raise OSError(f"{path} has {size} bytes, but {record.size} were written")
    if missing := written.keys() - listing.keys():
        raise OSError(f"{directory / sorted(missing)[0]} was written and is not there: do all processes see the same file system?")
    content = {"format_version": FORMAT_VERSION, "created": datetime.now(UTC).isoformat(timespec="seconds"), "files": listing}
    (directory / FILES_NAME).write_text(json.dumps(content, indent=1))
    sync(directory / FILES_NAME)
    for folder in (*(p for p in directory.rglob("*") if p.is_dir()), directory):
        sync(folder)


def read(directory: Path) -> dict:
    """The content of files.json. Raises ValueError where there is none that can be used."""
    try:
        content = json.loads((directory / FILES_NAME).read_text())
        usable = all({"size", "sha256"} <= entry.keys() for entry in content["files"].values())
        version = int(content["format_version"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{reason}. {MEANING}") from error
    if version > FORMAT_VERSION:
        raise ValueError(f"format {version} is newer than {FORMAT_VERSION}, the newest this version reads")
    if not usable:
        raise ValueError(f"a file is listed without its size or checksum. {MEANING}")
    return content


def damages(directory: Path, contents: bool = False, progress: Callable[[int], None] = lambda nbytes: None) -> Iterator[str]:
    """One line for each file that is not as it was written. contents: compare checksums, not only sizes.

    progress: told of bytes that were read.
    """
    try:
        listing = read(directory)["files"]
    except ValueError as error:
        yield f"{FILES_NAME}: {error}"
        return
    intact = []
    for name, entry in listing.items():
        try:
            size = (directory / name).stat().st_size
        except OSError:
            yield f"{name} is missing"
            continue
        if size != entry["size"]:
            yield f"{name} has {size} bytes instead of {entry['size']}"
        else:
            intact.append(name)
    if not contents:
        return
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        yield from filter(None, pool.map(lambda name: _difference(directory, name, listing[name]["sha256"], progress), intact))


def _difference(directory: Path, name: str, expected: str, progress: Callable[[int], None]) -> str | None:
    try:
        digest = sha256(directory / name, progress)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    return None if digest == expected else f"{name} has other contents than when it was written"


def damage(directory: Path, contents: bool = False, progress: Callable[[int], None] = lambda nbytes: None) -> str | None:
    """Why this directory is not a complete checkpoint; None where it is one."""
    return next(damages(directory, contents, progress), None)


def size(directory: Path) -> int:
    """Bytes of all files now; what another process removes meanwhile does not count."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def sha256(path: Path, progress: Callable[[int], None] = lambda nbytes: None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
