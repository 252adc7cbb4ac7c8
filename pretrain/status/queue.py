"""What Slurm says of jobs, where the command `squeue` is there and answers; everything works without it."""

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

TIMEOUT_S = 5.0
FORMAT = "%A|%T|%r|%S"
"""Job id, state, reason, (expected) start."""
UNKNOWN = "Invalid job id"
"""Said of jobs that have left the queue."""
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
AT_WORK = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
SUSPENDED = ("SUSPENDED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """A job in Slurm's queue."""

    number: str
    state: str
    """Slurm's word: PENDING, RUNNING, ..."""
    reason: str = ""
    """Why it waits; "" where Slurm gives none."""
    start: str = ""
    """When it started or is expected to, ISO 8601 without a time zone; "" where unknown."""

    def __str__(self) -> str:
        expected = f", expected to start {self.start}" if self.start and self.state in WAITING else ""
        return self.state + (f" ({self.reason})" if self.reason else "") + expected


def ask(numbers: Iterable[str], timeout_s: float = TIMEOUT_S) -> dict[str, Job] | None:
    """Those of these jobs that are in the queue, by their numbers. None where there is no Slurm here, or it does not answer in time."""
    known = sorted({number for number in numbers if number.isdecimal()})
    if not known:
        return None
    command = ["squeue", "--noheader", f"--jobs={','.join(known)}", f"--format={FORMAT}", "--states=all"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse(told.stdout) if not told.returncode or UNKNOWN in told.stderr else None


def parse(text: str) -> dict[str, Job]:
    """squeue's lines in FORMAT; a job that has ended and is still remembered is none. Of an array the tasks are jobs of their own."""
    jobs = {}
    for line in text.splitlines():
        number, _, rest = line.strip().partition("|")
        state, _, rest = rest.partition("|")
        # A reason may be a sentence.
        reason, _, start = rest.rpartition("|")
        if number.isdecimal() and state in (*WAITING, *AT_WORK):
            jobs[number] = Job(number, state, "" if reason == "None" else reason, "" if start in ("N/A", "") else start)
    return jobs
