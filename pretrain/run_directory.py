"""Whether a run can write its directory: told before anything is built, in words, and without leaving anything behind."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.lease import Lease

PROBE_BYTES = 64 << 10
"""More than the files that a run begins with."""
WRITTEN = (
    "config.yaml", "run.json", "metrics.jsonl", "metrics.discarded.jsonl", "system.jsonl", "shipped.json", "run_id", "rollbacks.json",
    "notify.log",
)  # fmt: skip
FOLDERS = ("checkpoints", "artifacts", "previous", "skipped", "spikes", ".owner", "slurm", "code")
"""What a run writes in its directory, and what must be writable where it is there already."""

STOP_NAME, SAVE_NAME = "STOP", "SAVE"
"""Switches that a user sets (pretrain.callbacks.switches)."""


def problems(directory: Path, field: str = "output_dir") -> list[str]:
    """What can be seen without writing: a file in the way, a read-only file system, missing permissions. field: said to be at fault."""
    found = directory.absolute()
    try:
        while not found.is_dir():
            # Looked at once more: another process may have made it since.
            if os.path.lexists(found) and not found.is_dir():
                kind = "a link to nothing" if found.is_symlink() and not found.exists() else "a file"
                return [_refusal(directory, f"{found} is {kind}, and a directory is needed", field)]
            found = found.parent
    except OSError as error:
        return [_refusal(directory, _text(error), field)]
    here = [found / name for name in (*WRITTEN, *FOLDERS)] if found == directory.absolute() else []
    for path in here:
        if os.path.lexists(path) and path.is_dir() != (path.name in FOLDERS):
            return [_refusal(directory, f"{path} is {'a folder' if path.is_dir() else 'no folder'}, which a run needs otherwise", field)]
    for path in (found, *here):
        mode = os.W_OK | (os.X_OK if path.is_dir() else 0)
        # Looked for last: another run may just have removed it.
        if not os.access(path, mode, effective_ids=True) and path.exists():
            reason = f"{path} is write-protected for user {os.geteuid()} or lies on a read-only file system"
            return [_refusal(directory, reason, field)]
    return []


def own(lease: Lease, say: Callable[[str], None], waiting: Callable[[], None] = lambda: None) -> str:
    """Acquire the lease, and write for trial; returns the owner's token. waiting: called now and then meanwhile.

    Raises ValueError where either cannot be.
    """
    with writing(lease.directory):
        lease.acquire(say, waiting)
        probe = lease.directory / f".probe.{secrets.token_hex(4)}"
        try:
            with probe.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    return lease.owner.token


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns what the file system refuses meanwhile into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(_refusal(directory, _text(error))) from error


def _refusal(directory: Path, reason: str, field: str = "output_dir") -> str:
    return f"{field}: {directory} cannot be written ({reason}): choose another output_dir, or see to its permissions and free space"


def _text(error: OSError) -> str:
    # Of a file that is written beside and renamed, the name it was to get.
    name = error.filename2 or error.filename
    return f"{error.strerror or error}{f': {name}' if name else ''}"
