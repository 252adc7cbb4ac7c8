"""Runs a function over many tasks in spawned processes, results in the order of the tasks.

One worker means this process: nothing is started. The number of tasks in flight is bounded, so that results which
wait for their turn do not pile up. A worker ends by itself when its parent is killed.
"""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from data_tools.errors import DataError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """A pool of `count` processes, started with the first task; use it as a context manager."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Yields `function(task)` for each task, in order. An exception of a task is raised here."""
        if self.count == 1:
            yield from map(function, tasks)
            return
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
        waiting: collections.deque = collections.deque()
        try:
            for task in tasks:
                waiting.append(self.pool.submit(function, task))
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            remedy = f"run the same command again with fewer --workers than {self.count}, finished work is kept"
            raise DataError(f"a worker process died (out of memory?): {remedy}") from error


def available_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _end_with_parent() -> None:
    """A killed parent closes nothing that its workers wait on, so each watches for its end.

    Ctrl-C reaches every process of the terminal; the parent alone answers it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
