"""What the ranks let each other know besides their collectives: in the key-value store of the launcher, over a connection apart.

A store whose machine has lost its power does not answer, and torch's client waits for it without end. Here every question has its
time, and after one without an answer nothing more is asked until that has come.
"""

import json
import os
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

PREFIX = "megatron_qsparse.watchdog"
ANSWER_S = 10.0


class Blackboard:
    """Of one rank. What cannot be written or read costs nothing: the report of this rank must not depend on others."""

    def __init__(self) -> None:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Shared with no other thread, which could hold it for minutes.
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER_S))
        self._store = dist.PrefixStore(PREFIX, store)
        self._asking: threading.Thread | None = None
        self._gone = False

    def write(self, key: str, value: str) -> None:
        self._ask(lambda store: store.set(key, value))

    def has(self, key: str) -> bool:
        return bool(self._ask(lambda store: store.check([key])))

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
        if self._gone or (self._asking is not None and self._asking.is_alive()):
            return None
        answers = []

        def ask() -> None:
            try:
                answers.append(question(self._store))
            except RuntimeError:
                # Torch does not connect again, and prints a page at each further try.
                self._gone = True

        self._asking = threading.Thread(target=ask, name="blackboard", daemon=True)
        self._asking.start()
        self._asking.join(ANSWER_S)
        return answers[0] if answers else None
