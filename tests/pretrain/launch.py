"""Starting real training runs from tests: forked processes where the launcher does not matter, else torchrun in its own process group."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.pretrain.forked import ForkedRun

TIMEOUT_S = 300
TINY = [
    *("--model.num_layers", "2", "--model.hidden_size", "64", "--model.ffn_hidden_size", "128", "--model.num_attention_heads", "4"),
    *("--data.sequence_length", "32", "--train.log_interval", "1", "--tracking.enabled", "false", "--tracking.system_metrics", "false"),
    *("--device", "cpu"),
]
"""A model that trains in milliseconds a step and logs every one."""


def train_command(*args: object, processes: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, "-m", "pretrain.train", *TINY, *(str(arg) for arg in args)]


@contextlib.contextmanager
def started(command: list[str], **popen) -> Iterator[subprocess.Popen]:
    """The running command; whatever is left of its process group at the end is killed."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", **popen.pop("env", {}))
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def training(*args: object, processes: int = 2, before: Callable[[int], None] | None = None) -> ForkedRun:
    """A run at work, to be used in a `with`."""
    return ForkedRun([*TINY, *(str(arg) for arg in args)], processes, before)


def train(*args: object, processes: int = 2) -> str:
    """Run to the end and return the output; the test fails, showing it, where the exit status is not 0."""
    with training(*args, processes=processes) as run:
        output, _ = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 0, output
    return output


def fail(*args: object, processes: int = 2) -> str:
    """Run to the end and return the output; the test fails, showing it, where the exit status is 0."""
    with training(*args, processes=processes) as run:
        output, _ = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode, output
    return output


def wait_for_step(process: subprocess.Popen | ForkedRun, run: Path, step: int) -> None:
    """Return as soon as the journal of the run holds this step."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if any(entry["step"] >= step for entry in journal(run)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise TimeoutError(f"{run} did not reach step {step}")


def signal_workers(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal to the training processes, not to the torchrun agent."""
    for child in psutil.Process(process.pid).children():
        if "pretrain.train" in child.cmdline():
            child.send_signal(number)


def journal(run: Path) -> list[dict]:
    """Complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["train/loss"] for entry in journal(run) if "train/loss" in entry}
