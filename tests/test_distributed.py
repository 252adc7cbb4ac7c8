"""The helper itself: results in rank order, failures with their traceback, nothing left behind."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Pool, run_distributed


def _sum_of_ranks(rank, offset):
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return rank, total


def _fail_on_rank_one(rank):
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def _die(rank):
    if rank == 0:
        os._exit(7)
    dist.barrier()


def _hang(rank):
    time.sleep(600)


def _process_and_world(rank):
    return os.getpid(), dist.get_world_size(), rank


def test_results_come_in_rank_order():
    results = run_distributed(_sum_of_ranks, 2, 10)
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.item() == 21 for _, total in results)


@pytest.mark.parametrize(
    ("fn", "error", "words", "timeout"),
    [
        (_fail_on_rank_one, RuntimeError, "rank 1:(.|\n)*_fail_on_rank_one(.|\n)*KeyError: 'the reason'", 60),
        (_die, RuntimeError, "rank 0:\ndied without a report, exit code 7", 60),
        (_hang, TimeoutError, r"ranks \[0, 1\] did not answer", 5),
    ],
)
def test_failures_are_told_and_nothing_is_left(fn, error, words, timeout):
    with pytest.raises(error, match=words):
        run_distributed(fn, 2, timeout=timeout)
    assert not multiprocessing.active_children()


def test_a_pool_keeps_its_processes_and_gives_each_call_a_world():
    with Pool(3) as pool:
        three, one = pool.run(_process_and_world, 3), pool.run(_process_and_world, 1)
        assert [(size, rank) for _, size, rank in three] == [(3, 0), (3, 1), (3, 2)]
        assert one == [(three[0][0], 1, 0)]
        with pytest.raises(RuntimeError, match="KeyError: 'the reason'"):
            pool.run(_fail_on_rank_one, 2)
        again = pool.run(_process_and_world, 2)
        assert [(size, rank) for _, size, rank in again] == [(2, 0), (2, 1)]
        assert not {pid for pid, *_ in again} & {pid for pid, *_ in three}
        with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] did not answer(.|\n)*rank 1 hung at:(.|\n)* in _hang"):
            pool.run(_hang, 2, timeout=5)
        with pytest.raises(ValueError, match="4 ranks of a pool of 3"):
            pool.run(_process_and_world, 4)
    assert not multiprocessing.active_children()
