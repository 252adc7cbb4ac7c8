"""Ranks that the others wait for are named; ranks that are alike are not."""

import os
import signal
import time

import pytest

from pretrain.callbacks import stragglers
from pretrain.callbacks.stragglers import Measured, ratios, slow
from tests.pretrain.launch import TIMEOUT_S, journal, training, wait_for_step

ARGUMENTS = ("--train.micro_batch_size", 4, "--train.global_batch_size", 16)


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
    run = tmp_path / "run"
    with training("--data.path", shards, "--output_dir", run, *ARGUMENTS, "--train.steps", 100_000) as process:
        wait_for_step(process, run, 2)
        while "slow: rank 1" not in process.output:
            assert process.poll() is None, process.output
            os.kill(process.processes[1].pid, signal.SIGSTOP)
            time.sleep(0.045)
            os.kill(process.processes[1].pid, signal.SIGCONT)
            time.sleep(0.005)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, output
    named = [line for line in output.splitlines() if line.startswith("slow: ")]
    assert named and all(line.startswith("slow: rank 1 (") and "local rank 1" in line for line in named), output
    assert max(entry["perf/slowest_rank_ratio"] for entry in journal(run) if "perf/slowest_rank_ratio" in entry) > 1.5


def _overlook_a_busy_machine(rank: int) -> None:
    stragglers.LEAST_S = 0.5


@pytest.mark.parametrize(("factor", "measures"), [(1.5, True), (0, False)])
def test_ranks_that_are_alike(shards, tmp_path, factor, measures):
    run = tmp_path / "run"
    arguments = ["--data.path", shards, "--output_dir", run, *ARGUMENTS, "--train.steps", 6, "--train.straggler_factor", factor]
    with training(*arguments, before=_overlook_a_busy_machine) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0 and "slow: " not in output, output
    assert all(("perf/slowest_rank_ratio" in entry) == measures for entry in journal(run) if "train/loss" in entry)
