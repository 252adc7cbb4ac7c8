"""Ranks that the others wait for are named; ranks that are alike are not."""

import contextlib
import os
import signal
import threading
import time

import pytest

from pretrain.callbacks.stragglers import Measured, ratios, slow
from tests.pretrain.launch import TIMEOUT_S, journal, train, training, wait_for_step

ARGUMENTS = ("--train.steps", 30, "--train.micro_batch_size", 4, "--train.global_batch_size", 16)


def measured(*forward_s: float, waited_s: float = 0.0, stage: int = 0) -> list[Measured]:
    return [Measured(seconds, waited_s, stage) for seconds in forward_s]


class TestSlow:
    def test_one_among_many(self):
        found = slow(measured(1.0, 1.1, 2.0, 0.9), 1.5, 3.0)
        assert found == {2: "its forward passes take 2.0 x the median of its pipeline stage (2.000 s, 1.000 s)"}

    def test_one_of_two(self):
        assert list(slow(measured(1.0, 1.6), 1.5, 3.0)) == [1]
        assert slow(measured(1.0, 1.4), 1.5, 3.0) == {}

    def test_stages_are_not_compared_with_each_other(self):
        both = measured(1.0, 1.0) + measured(3.0, 3.0, stage=1)
        assert slow(both, 1.5, 8.0) == {} and ratios(both) == [1.0] * 4
        assert list(slow(both + measured(6.0, stage=1), 1.5, 8.0)) == [4]

    def test_differences_too_small_to_matter(self):
        assert slow(measured(0.001, 0.01), 1.5, 0.1) == {}

    def test_waiting_for_data(self):
        found = slow([*measured(1.0, 1.0, 1.0), Measured(1.0, 2.0, 0)], 1.5, 4.0)
        assert found == {3: "it waits 2.000 s a step for data, the median is 0.000 s"}

    def test_waiting_is_compared_within_a_stage(self):
        later = [Measured(1.0, 2.0, 1)] * 2
        assert slow([*measured(1.0, 1.0), *later], 1.5, 4.0) == {}
        assert list(slow([*measured(1.0, 1.0), *later, Measured(1.0, 4.0, 1)], 1.5, 4.0)) == [4]

    def test_no_time_at_all(self):
        assert ratios(measured(0.0, 0.0)) == [1.0, 1.0]


def test_a_slow_rank_is_named_once(shards, tmp_path):
    run, ended = tmp_path / "run", threading.Event()

    def hold_up(process) -> None:
        while not ended.is_set():
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.045)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.005)

    with training("--data.path", shards, "--output_dir", run, *ARGUMENTS) as process:
        wait_for_step(process, run, 2)
        thread = threading.Thread(target=hold_up, args=(_Signals(process.processes[1].pid),))
        thread.start()
        try:
            output, _ = process.communicate(TIMEOUT_S)
        finally:
            ended.set()
            thread.join()
    assert process.returncode == 0, output
    named = [line for line in output.splitlines() if line.startswith("slow: ")]
    assert named and all(line.startswith("slow: rank 1 (") and "local rank 1" in line for line in named), output
    assert max(entry["perf/slowest_rank_ratio"] for entry in journal(run) if "perf/slowest_rank_ratio" in entry) > 1.5


class _Signals:
    """Sends to a process that may have ended."""

    def __init__(self, pid: int):
        self.pid = pid

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


@pytest.mark.parametrize(("factor", "measures"), [(1.5, True), (0, False)])
def test_ranks_that_are_alike(shards, tmp_path, factor, measures):
    run = tmp_path / "run"
    output = train("--data.path", shards, "--output_dir", run, *ARGUMENTS, "--train.steps", 6, "--train.straggler_factor", factor)
    assert "slow: " not in output
    assert all(("perf/slowest_rank_ratio" in entry) == measures for entry in journal(run) if "train/loss" in entry)
