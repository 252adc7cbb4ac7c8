"""Ends a run that hangs, and names the ranks that the others wait for.

A thread of each rank looks at the rank's own progress. It works while the training thread is blocked in gloo or NCCL, which
release Python's lock. What a rank does is published in the launcher's key-value store, over a connection of the thread's own.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import psutil
import torch.distributed as dist

from pretrain.progress import Progress

MAX_TICK_S = 5.0
COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")
"""Files of functions that a rank waits in for other ranks."""
PREFIX = "megatron_qsparse.watchdog"


class Watchdog:
    """Of one rank; torch.distributed must run. Threads apart, nothing of it is in the way of training.

    timeout_s: how long a phase may take; 0 only publishes who lives.
    """

    def __init__(self, progress: Progress, timeout_s: float):
        self.progress, self.timeout_s = progress, timeout_s
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.tick_s = min(MAX_TICK_S, timeout_s / 4) if timeout_s else MAX_TICK_S
        self._training = threading.get_ident()
        self._beat = 0
        self._ended = threading.Event()
        self._store = _connect(self.tick_s)
        self._publish()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This rank's part is done in order."""
        self._ended.set()
        self._thread.join()
        self._publish(done=True)

    def lost(self) -> list[int]:
        """Ranks on this machine whose process is gone without having done its part."""
        states = {rank: state for rank in range(self.size) if (state := self._state(rank)) is not None}
        return [
            rank for rank, state in states.items()
            if not state["done"] and state["host"] == socket.gethostname() and not _lives(state["pid"])
        ]  # fmt: skip

    def _watch(self) -> None:
        while not self._ended.wait(self.tick_s):
            self._beat += 1
            self._publish()
            late = self.timeout_s and time.monotonic() - self.progress.now.since > self.timeout_s
            if late or (self.timeout_s and self._has("hang")):
                self._end()

    def _end(self) -> None:
        """Say where this rank is, after those that the others wait for, and leave."""
        self._set("hang", "1")
        before = {rank: self._state(rank) for rank in range(self.size)}
        # Who lives beats again within this time.
        if self._ended.wait(3 * self.tick_s):
            return
        self._beat += 1
        self._publish()
        culprits = self._culprits(before)
        if culprits and self.rank not in culprits:
            time.sleep(min(2.0, self.timeout_s))
        doing, host = self.progress.now, socket.gethostname()
        waited = time.monotonic() - doing.since
        self._say(f"rank {self.rank} ({host}): no progress for {waited:.0f} s {doing}{self._told(culprits)}")
        # The launcher ends the others as soon as one has ended.
        time.sleep(min(3.0, self.timeout_s))
        os._exit(1)

    def _told(self, culprits: dict[int, str]) -> str:
        if self.rank in culprits:
            return "; the others wait for this rank" if self.size > 1 else ""
        if not culprits:
            return "; no rank is behind the others: see their stacks"
        return f"; waiting for ranks {sorted(culprits)}: " + "; ".join(f"rank {rank} {what}" for rank, what in sorted(culprits.items()))

    def _culprits(self, before: dict[int, dict | None]) -> dict[int, str]:
        """rank -> what it does: those that do not answer, else those behind the others, else those that wait for nobody."""
        now = {rank: self._state(rank) for rank in range(self.size)}
        silent = [rank for rank in now if rank != self.rank and (now[rank] is None or self._is_silent(before[rank], now[rank]))]
        if silent:
            return {rank: f"does not answer, last heard of {now[rank]['doing']}" if now[rank] else "never answered" for rank in silent}
        at_work = {rank: state for rank, state in now.items() if not state["waits"]}
        if at_work:
            now = at_work
        least = min((state["step"], state["count"]) for state in now.values())
        behind = {rank: state["doing"] for rank, state in now.items() if (state["step"], state["count"]) == least}
        return behind if len(behind) < self.size else {}

    def _is_silent(self, before: dict | None, now: dict) -> bool:
        return not now["done"] and before is not None and before["beat"] == now["beat"]

    def _say(self, text: str) -> None:
        sys.stderr.write(text + "; its stack:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)

    def _waits(self) -> bool:
        """Whether the training thread is in a collective: then it is not the one that others wait for."""
        frame, depth = sys._current_frames().get(self._training), 0
        while frame is not None and depth < 4:
            if any(folder in frame.f_code.co_filename for folder in COLLECTIVES):
                return True
            frame, depth = frame.f_back, depth + 1
        return False

    def _publish(self, done: bool = False) -> None:
        doing = self.progress.now
        state = {
            "step": doing.step, "count": doing.count, "doing": str(doing), "waits": self._waits(), "beat": self._beat, "done": done,
            "pid": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip
        self._set(f"rank {self.rank}", json.dumps(state))

    # A store that is gone takes the names of the others with it, not this rank's own report.
    def _set(self, key: str, value: str) -> None:
        with suppress(RuntimeError):
            self._store.set(key, value)

    def _has(self, key: str) -> bool:
        with suppress(RuntimeError):
            return self._store.check([key])
        return False

    def _state(self, rank: int) -> dict | None:
        key = f"rank {rank}"
        with suppress(RuntimeError):
            if self._store.check([key]):
                return json.loads(self._store.get(key))
        return None


def _lives(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _connect(tick_s: float) -> dist.Store:
    """A client of the store that the processes found each other by; shared with no other thread, which could hold it for minutes."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(PREFIX, dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(10.0, tick_s))))
