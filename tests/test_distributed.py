"""The helper itself: results in rank order, failures with their traceback, nothing left behind."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed


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
