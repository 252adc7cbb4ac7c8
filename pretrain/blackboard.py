"""What the ranks let each other know besides their collectives: in the key-value store of the launcher, over a connection apart.

A store whose machine has lost its power does not answer, and torch's client waits for it without end. Here every question has its
time, and after one without an answer nothing more is asked until that has come.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PREFIX = "megatron_qsparse.watchdog"
ANSWER_S = 10.0
AGAIN_S = 60.0
"""Between two attempts to reach a store that was lost: torch prints at each of them."""


class Blackboard:
    """Of one rank. What cannot be written or read costs nothing: the report of this rank must not depend on others."""

    def __init__(self) -> None:
        self._store: dist.Store | None = self._connect()
        self._asking: threading.Thread | None = None
        self._one_at_a_time = threading.Lock()
        self._lost = 0.0

    def _connect(self) -> dist.Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Shared with no other thread, which could hold it for minutes.
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER_S))
        # The store of torchrun outlives the processes that it starts again.
        return dist.PrefixStore(f"{PREFIX}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def write(self, key: str, value: str) -> None:
        self._ask(lambda store: store.set(key, value))

    def has(self, key: str) -> bool:
        return bool(self._ask(lambda store: store.check([key])))

    def first(self, key: str) -> bool | None:
        """Whether this rank is the first to ask for it; None where the store does not answer."""
        return self._ask(lambda store: store.add(key, 1) == 1)

    def write_state(self, rank: int, state: dict[str, Any]) -> None:
        self.write(f"rank {rank}", json.dumps(state))

    def states(self, ranks: Iterable[int]) -> dict[int, dict[str, Any] | None]:
        """What they have written last, None where nothing; empty where the store does not answer."""
        keys = {rank: f"rank {rank}" for rank in ranks}

        def read(store: dist.Store) -> dict[int, dict[str, Any] | None]:
            # Nearly always all are there: two questions, however many ranks.
            there = keys if store.check(list(keys.values())) else {rank: key for rank, key in keys.items() if store.check([key])}
            found = dict(zip(there, map(json.loads, store.multi_get(list(there.values()))), strict=True))
            return {rank: found.get(rank) for rank in keys}

        return self._ask(read) or {} if keys else {}

    def _ask(self, question: Callable[[dist.Store], Any]) -> Any:
        """The answer; None where there is none."""
        if not self._one_at_a_time.acquire(timeout=ANSWER_S):
            return None
        try:
            return self._ask_alone(question)
        finally:
            self._one_at_a_time.release()

    def _ask_alone(self, question: Callable[[dist.Store], Any]) -> Any:
        if self._asking is not None and self._asking.is_alive():
            return None
        if self._store is None and time.monotonic() - self._lost < AGAIN_S:
            return None
        answers = []

        def ask() -> None:
            try:
                # Torch's client does not connect again by itself.
                self._store = self._store or self._connect()
                answers.append(question(self._store))
            except RuntimeError:
                self._store, self._lost = None, time.monotonic()

        self._asking = threading.Thread(target=ask, name="blackboard", daemon=True)
        self._asking.start()
        self._asking.join(ANSWER_S)
        return answers[0] if answers else None
