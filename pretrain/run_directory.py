"""Whether a run can write its directory: told before anything is built, in words, and without leaving anything behind."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.lease import Lease

PROBE_BYTES = 64 << 10
"""More than the files that a run begins with."""
WRITTEN = ("config.yaml", "run.json", "metrics.jsonl", "system.jsonl", "shipped.json", "run_id", "checkpoints", "artifacts", ".owner")
"""What a run writes in its directory, and what must be writable where it is there already."""


def problems(directory: Path) -> list[str]:
    """What can be seen without writing: a file in the way, a read-only file system, missing permissions."""
    found = directory.absolute()
    try:
        while not found.is_dir():
            # A broken link neither exists nor can be made.
            if found.exists() or found.is_symlink():
                return [_refusal(directory, f"{found} is no directory")]
            found = found.parent
    except OSError as error:
        return [_refusal(directory, _text(error))]
    here = [found / name for name in WRITTEN] if found == directory.absolute() else []
    for path in (found, *here):
        # Looked for last: another run may just have removed it.
        if not os.access(path, os.W_OK, effective_ids=True) and path.exists():
            return [_refusal(directory, f"{path} is write-protected for user {os.geteuid()} or lies on a read-only file system")]
    return []


def own(lease: Lease, say: Callable[[str], None]) -> None:
    """Acquire the lease, and write for trial. Raises ValueError where either cannot be."""
    with writing(lease.directory):
        lease.acquire(say)
        probe = lease.directory / f".probe.{secrets.token_hex(4)}"
        try:
            with probe.open("wb") as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns what the file system refuses meanwhile into a ValueError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(_refusal(directory, _text(error))) from error


def _refusal(directory: Path, reason: str) -> str:
    return f"output_dir: {directory} cannot be written ({reason}): choose another output_dir, or see to its permissions and free space"


def _text(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
