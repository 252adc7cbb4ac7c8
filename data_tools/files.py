"""Files that are either whole or absent.

Whatever this package publishes is written beside its final name, flushed to the device and renamed, so that a
process killed at any instruction leaves the previous state or the new one. A full disk becomes one line that names
the path, and the partial file is removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from data_tools.errors import DataError

TEMPORARY_SUFFIX = ".tmp"
WHOLE_FINGERPRINT_BYTES = 16 << 20
WINDOW_BYTES = 256 << 10
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns "no space", "quota" and "file too large" inside the block into a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise DataError(
            f"disk full while writing {path} ({error.strerror}): free space and run the same command again, finished work is kept"
        ) from error


class AtomicFile:
    """A binary file that appears as `path` with `commit()`, and not at all before or after `discard()`.

    As a context manager it commits when the block ends without an error and discards otherwise.
    `durable=False` leaves out the flush to the device, for work files that can be made again after a power loss.
    `staging`: folder for the unfinished file, on the same file system; by default that of `path`.
    A full disk is a DataError, and the unfinished file is removed.
    """

    def __init__(self, path: Path, staging: Path | None = None, durable: bool = True) -> None:
        self.path = path
        self.durable = durable
        # Two machines that share the folder may have processes of the same number.
        self.temporary = (staging or path.parent) / f"{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        with disk_errors(path):
            self.file = open(self.temporary, "wb", buffering=1 << 20)

    def write(self, content: bytes | memoryview) -> None:
        try:
            with disk_errors(self.path):
                self.file.write(content)
        except BaseException:
            self.discard()
            raise

    def commit(self) -> None:
        """Flushes to the device and gives the file its name."""
        try:
            with disk_errors(self.path):
                self.file.flush()
                if self.durable:
                    os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.temporary, self.path)
                if self.durable:
                    sync(self.path.parent)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Removes the unfinished file; does nothing after `commit`."""
        # Closing flushes what is buffered, which fails again on a full disk; the file goes away all the same.
        with contextlib.suppress(OSError):
            self.file.close()
        self.temporary.unlink(missing_ok=True)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None:
            self.commit()
        else:
            self.discard()


def write_atomically(path: Path, content: bytes, staging: Path | None = None) -> None:
    """Publishes `content` as `path`."""
    with AtomicFile(path, staging) as file:
        file.write(content)


def sync(path: Path) -> None:
    """Flushes a file, or a directory with the renames inside it, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Creates a folder and those above it that are missing, and flushes the entry of each to the device.

    Raises NotADirectoryError where a file is in the way.
    """
    missing = []
    while not path.is_dir():
        # Another process may have made it since.
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Recognizes an input file again, at once even where it is huge.

    Up to 16 MiB it is the SHA-256 of the content. A larger file is represented by its size and 64 evenly spaced
    windows of 256 KiB, the first and the last bytes included.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}:".encode())
    with open(path, "rb") as file:
        if size <= WHOLE_FINGERPRINT_BYTES:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        else:
            windows = WHOLE_FINGERPRINT_BYTES // WINDOW_BYTES
            for window in range(windows):
                file.seek((size - WINDOW_BYTES) * window // (windows - 1))
                digest.update(file.read(WINDOW_BYTES))
    return digest.hexdigest()
