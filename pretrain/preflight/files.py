"""Disks and shards as this node sees them: by writing and by reading, since a mount that is missing or read-only shows only then."""

import contextlib
import errno
import os
import secrets
import socket
import time
from pathlib import Path

from data_tools.errors import ManifestError
from data_tools.manifest import MANIFEST_NAME, Manifest

PROBE_BYTES = 16 << 20
"""Of the file that is written: past what a nearly full disk or a quota would still take."""
PROBE_NAME = ".preflight"
LEFT_OVER_S = 3600.0
"""Age from which on a file like that belongs to a process that was killed."""
SHARDS = 8
"""Opened, evenly spaced."""
HEAD_BYTES = 512
"""Read of each: a tar header."""


def probe_disk(folder: Path, needed_bytes: int) -> tuple[int, float]:
    """(free bytes, MB/s of a file written and flushed to the device). Raises ValueError where there is no room or nothing can be written.

    The directory is not made: where its file system is not mounted, that would fill another one.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no directory on this node: is its file system mounted?")
    path = folder / f"{PROBE_NAME}.{socket.gethostname()}.{secrets.token_hex(4)}"
    _remove_left_over(folder)
    chunk = os.urandom(1 << 20)
    try:
        begun = time.perf_counter()
        try:
            with path.open("wb") as file:
                for _ in range(PROBE_BYTES // len(chunk)):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            seconds = time.perf_counter() - begun
        finally:
            path.unlink(missing_ok=True)
        state = os.statvfs(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ValueError(
            f"cannot write {PROBE_BYTES >> 20} MB in {folder} ({error.strerror or error}): {'free space' if full else 'see to the mount'}"
        ) from error
    free = state.f_bavail * state.f_frsize
    if free < needed_bytes:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed: free space")
    return free, PROBE_BYTES / 1e6 / seconds


def _remove_left_over(folder: Path) -> None:
    for path in folder.glob(f"{PROBE_NAME}.{socket.gethostname()}.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFT_OVER_S:
                path.unlink()


def read_shards(directory: Path) -> str:
    """The manifest's digest. Raises ValueError where this node cannot read the manifest, or a shard is missing, cut or unreadable."""
    try:
        manifest = Manifest.load(directory)
    except (ManifestError, OSError) as error:
        raise ValueError(f"cannot read the manifest {directory / MANIFEST_NAME} ({error})") from error
    try:
        for split in manifest.splits:
            manifest.check_sizes(split)
        step = max(1, len(manifest.shards) // SHARDS)
        for shard in manifest.shards[::step][:SHARDS]:
            with (directory / shard.name).open("rb") as file:
                if len(file.read(HEAD_BYTES)) < min(HEAD_BYTES, shard.size):
                    raise ValueError(f"cannot read the shards of {directory} ({shard.name} ends early)")
    except (ManifestError, OSError) as error:
        raise ValueError(f"cannot read the shards of {directory} ({error})") from error
    return manifest.digest
