"""Whether a process is still at work, for others on the same machine that look after it."""

import os
import secrets
import socket
from pathlib import Path

ENDED = ("Z", "X", "x")
"""States of a process that does nothing any more: nobody has waited for it yet, as in containers without an init."""


def machine() -> str:
    """Equal for processes that see each other's PIDs: of one boot and one PID namespace."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(8)}"


def started(pid: int) -> int | None:
    """When it was started, in clock ticks since the boot, as the kernel counts them (proc(5)): no clock that is set changes it.

    None where there is no such process, or one that has ended. Raises OSError where that cannot be known.
    """
    try:
        # The name, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        _raise_if_hidden(pid)
        return None
    return None if fields[0] in ENDED else int(fields[19])


def _raise_if_hidden(pid: int) -> None:
    """/proc may be mounted so that it shows nobody else's processes (hidepid). Raises PermissionError where it is."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return
