"""The nodes of a job among themselves, through a key-value store that the first of them holds: who came, when, whose clock is wrong.

Whatever waits for others has a limit, and one that is not there when it is over is waited for no more.
"""

import contextlib
import json
import statistics
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from pretrain.preflight.workers import first_line

if TYPE_CHECKING:
    from torch.distributed import Store

CLOCK_ROUNDS = 3
LOOK_S = 0.05
MARGIN_S = 5.0
"""That a node waits longer for the first one than that waits for the nodes."""


class Unreached(RuntimeError):
    """The others cannot be met, for the reason told."""


class Meeting:
    """Of one node. Raises Unreached where the store cannot be had within `limit_s`."""

    def __init__(self, nodes: list[str], node: str, address: str, port: int, limit_s: float):
        import torch.distributed as dist

        self.nodes, self.node, self.is_first = nodes, node, node == nodes[0]
        self.members: dict[str, int] = {}
        """Who came in time, in the order of `nodes` -> devices that can take part."""
        self.present: list[str] = []
        """Members that have come to whatever was waited for since."""
        try:
            self._store: Store = dist.TCPStore(
                address, port, is_master=self.is_first, timeout=timedelta(seconds=limit_s), wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            what = f"cannot listen at port {port}" if self.is_first else f"cannot reach {nodes[0]} at {address}:{port}"
            raise Unreached(f"{what} ({first_line(error)})") from error

    def come(self, devices: int, limit_s: float) -> None:
        """Sets `members`, the same for all. Raises Unreached where the first node does not say them, or without this one."""
        self._store.set(f"came/{self.node}", str(devices))
        try:
            if self.is_first:
                self._collect(limit_s)
            self._store.wait(["members"], timedelta(seconds=limit_s + MARGIN_S))
            self.members = json.loads(self._store.get("members"))
        except RuntimeError as error:
            raise Unreached(f"{self.nodes[0]} does not answer ({first_line(error)})") from error
        if self.node not in self.members:
            raise Unreached("came too late: the others had begun")
        self.present = list(self.members)

    def _collect(self, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        keys = {node: f"came/{node}" for node in self.nodes}
        while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        came = {node: int(self._store.get(key)) for node, key in keys.items() if self._store.check([key])}
        self._store.set("members", json.dumps(came))

    def wait_for_others(self, place: str, limit_s: float, word: str = "here") -> dict[str, str]:
        """Until all that are present are at `place`; who is not there in time is not present any more. Raises Unreached.

        Returns the word that each of those still present has left there.
        """
        keys = {node: f"{place}/{node}" for node in self.present}
        try:
            self._store.set(keys[self.node], word)
            try:
                self._store.wait(list(keys.values()), timedelta(seconds=limit_s))
            except RuntimeError:
                self.present = [node for node, key in keys.items() if self._store.check([key])]
            return {node: self._store.get(keys[node]).decode() for node in self.present}
        except RuntimeError as error:
            raise Unreached(f"{self.nodes[0]} does not answer any more ({first_line(error)})") from error

    def leave(self, limit_s: float) -> None:
        """The first node goes last: the store goes with it."""
        if self.is_first:
            self.wait_for_others("end", limit_s)
        else:
            with contextlib.suppress(RuntimeError):
                self._store.set(f"end/{self.node}", "1")

    def clock(self, limit_s: float) -> float | None:
        """Seconds that this node's clock is ahead of the first one's; None where that one is not there.

        Waking up late makes a clock look ahead, never behind: of several rounds the smallest difference is nearest to the truth.
        """
        differences = []
        for turn in range(CLOCK_ROUNDS):
            self.wait_for_others(f"clock {turn}", limit_s)
            if self.nodes[0] not in self.present:
                return None
            try:
                if self.is_first:
                    self._store.set(f"now {turn}", repr(time.time()))
                self._store.wait([f"now {turn}"], timedelta(seconds=limit_s))
                here = time.time()
                differences.append(here - float(self._store.get(f"now {turn}")))
            except RuntimeError as error:
                raise Unreached(f"{self.nodes[0]} does not answer any more ({first_line(error)})") from error
        return min(differences)


def skews(clocks: dict[str, float]) -> dict[str, float]:
    """Node -> seconds that its clock is ahead of the median one."""
    middle = statistics.median(clocks.values())
    return {node: clock - middle for node, clock in clocks.items()}


def rounds(nodes: list[str]) -> list[list[tuple[str, str]]]:
    """Pairs of nodes that measure at the same time, a list for each round.

    Neighbours of the ring both ways, and, from four nodes on, the opposite one: every node meets two others, or three, so that one
    that is slow with all of them differs from one whose partner is.
    """
    size = len(nodes)
    if size < 2:
        return []
    ring = [(i, (i + 1) % size) for i in range(size if size > 2 else 1)]
    # In a ring of an odd length the last edge meets one of the first round.
    turns = [ring[0 : size - size % 2 : 2], ring[1::2], ring[size - 1 :] if size % 2 else []]
    if size >= 4:
        turns.append([(i, i + size // 2) for i in range(size // 2)])
    return [[(nodes[a], nodes[b]) for a, b in turn] for turn in turns if turn]
