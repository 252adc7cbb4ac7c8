"""A disk that has no room for a checkpoint: told, tried again, and never at the price of one that is there."""

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pretrain.forked import ForkedRun
from tests.pretrain.launch import TIMEOUT_S, fail, journal, losses, train, training

BATCH = ["--train.global_batch_size", 4, "--validation.samples", 4, "--train.precision", "fp32", "--data.sequence_length", 16]
CHECKPOINT_MIB = 2.4
"""Of this model, 147,776 parameters: weights, masters and moments in fp32."""


@contextlib.contextmanager
def tmpfs(folder: Path, mib: float) -> Iterator[Path]:
    """A file system of this size."""
    if os.geteuid():
        pytest.skip("only root can mount a small file system")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(1024 * mib)}k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def _complete(run: Path) -> list[str]:
    return [name for name in _names(run) if "." not in name] if (run / "checkpoints").is_dir() else []


def _fill(path: Path, nbytes: int) -> None:
    """As soon as no save under way needs the room."""
    while True:
        try:
            path.write_bytes(bytes(nbytes))
            return
        except OSError as error:
            path.unlink()
            if error.errno != errno.ENOSPC:
                raise


def test_a_full_disk_is_warned_of_and_used_again_when_there_is_room(shards, tmp_path):
    with tmpfs(tmp_path / "disk", 4 * CHECKPOINT_MIB) as disk:
        run, ballast = disk / "run", disk / "ballast"
        arguments = ["--data.path", shards, *BATCH, "--checkpoint.interval", 20, "--checkpoint.keep_last", 1, "--output_dir", run]
        with training(*arguments, "--train.steps", 100_000, "--checkpoint.max_failures", 1000) as process:
            _until(process, lambda: _complete(run))
            # Room for less than the one kept and another.
            _fill(ballast, int(2.3 * CHECKPOINT_MIB * 2**20))
            _until(process, lambda: "3 of 1000 failures in a row" in process.output)
            kept = _complete(run)
            ballast.unlink()
            _until(process, lambda: max(_complete(run)) > kept[0])
            process.send_signal(signal.SIGUSR1)
            output, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, output
        assert "No space left on device" in output and "1 of 1000 failures in a row; the last complete one is" in output, output
        assert len(kept) == 1 and kept[0] in output
        last = max(losses(run))
        assert _names(run) == [f"step_{last:08d}"] and sorted(losses(run)) == list(range(1, last + 1))
        assert "is complete" in train(*arguments, "--train.steps", last, "--allow_change", "train.steps")


def test_after_so_many_failures_the_run_stops_in_words_and_can_go_on(shards, tmp_path):
    with tmpfs(tmp_path / "disk", 1.5 * CHECKPOINT_MIB) as disk:
        run = disk / "run"
        arguments = ["--data.path", shards, *BATCH, "--checkpoint.interval", 4, "--checkpoint.milestone_interval", 4, "--output_dir", run]
        more = ["--train.steps", 1000, "--allow_change", "train.steps"]
        train(*arguments, "--train.steps", 4, "--checkpoint.milestone_interval", 0)
        output = fail(*arguments, *more, "--checkpoint.max_failures", 2)
        assert "Traceback (most" not in output
        assert "error: 2 checkpoints in a row could not be written, the last one because: " in output
        assert "the last complete one is" in output and "No space left on device" in output
        assert _names(run) == ["milestone_00000004", "step_00000004"], "nothing half written stays; the milestone was owed"
        assert 12 <= max(losses(run)) < 1000 and len(journal(run)) == len({entry["step"] for entry in journal(run)})
        subprocess.run(["mount", "-o", f"remount,size={int(16 * CHECKPOINT_MIB)}m", disk], check=True)
        assert "going on after step 4" in train(*arguments, "--train.steps", 8, *more[2:])


def test_a_last_save_that_fails_is_an_error(shards, tmp_path):
    with tmpfs(tmp_path / "disk", 0.5 * CHECKPOINT_MIB) as disk:
        output = fail("--data.path", shards, *BATCH, "--train.steps", 3, "--output_dir", disk / "run")
        assert "error: the last checkpoint could not be written: there is no complete one yet" in output


def _until(process: ForkedRun, condition) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
