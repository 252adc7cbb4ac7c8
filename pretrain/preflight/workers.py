"""One process for each device of the node. One that hangs or dies, as a broken GPU makes it, is given up, and the rest goes on."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from pretrain.preflight import devices

QUESTIONS: dict[str, Callable[..., Any]] = {"count": devices.count, "compute": devices.compute, "all_reduce": devices.all_reduce}
PR_SET_PDEATHSIG = 1
LONG = 200
"""Characters of an error that are told."""


@dataclass(frozen=True)
class Answer:
    """`failure` is "" where there is a value."""

    value: Any = None
    failure: str = ""


class Workers:
    """Forked, so that libraries are imported once: nothing here may have touched CUDA, or begun a thread, before."""

    def __init__(self, size: int):
        import torch  # noqa: F401
        import torch.distributed  # noqa: F401

        context, parent = multiprocessing.get_context("fork"), os.getpid()
        self._connections: list[Connection] = []
        self._processes = []
        for _ in range(size):
            ours, theirs = context.Pipe()
            self._connections.append(ours)
            process = context.Process(target=_serve, args=(theirs, list(self._connections), parent), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
        self.alive = list(range(size))
        """Indices of those that have answered all that they were asked."""

    def ask(self, question: str, limit_s: float, arguments: Callable[[int], tuple], of: list[int] | None = None) -> dict[int, Answer]:
        """Index -> answer of those that live, or of those among `of`. One that does not answer within `limit_s` is ended."""
        asked = [index for index in self.alive if of is None or index in of]
        for index in asked:
            with contextlib.suppress(OSError):
                self._connections[index].send((question, arguments(index)))
        deadline, answers = time.monotonic() + limit_s, {}
        while len(answers) < len(asked):
            pending = {self._connections[index]: index for index in asked if index not in answers}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            for connection in ready:
                index = pending[connection]
                try:
                    answers[index] = connection.recv()
                except (EOFError, OSError):
                    self._processes[index].join(1)
                    answers[index] = self._give_up(index, f"its process died (exit status {self._processes[index].exitcode})")
            if not ready:
                answers |= {index: self._give_up(index, f"no answer within {limit_s:.0f} s") for index in pending.values()}
        return answers

    def _give_up(self, index: int, why: str) -> Answer:
        self.give_up(index)
        return Answer(failure=why)

    def give_up(self, index: int) -> None:
        """End the process of this device, where it has not ended."""
        self._processes[index].kill()
        if index in self.alive:
            self.alive.remove(index)

    def end(self) -> None:
        """All of them, at once."""
        for process in self._processes:
            process.kill()


def _serve(connection: Connection, others: list[Connection], parent: int) -> None:
    # A child that hangs in the driver must not outlive the node's process.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for other in others:
        other.close()
    while True:
        try:
            question, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = Answer(QUESTIONS[question](*arguments))
        except Exception as error:
            answer = Answer(failure=first_line(error))
        connection.send(answer)


def first_line(error: BaseException) -> str:
    """What a message of a library says in its first line."""
    lines = str(error).strip().splitlines()
    return lines[0][:LONG] if lines else type(error).__name__
