"""Ends a run that hangs, and names the ranks that the others wait for.

A thread of each rank looks at the rank's own progress. It works while the training thread is blocked in gloo or NCCL, which
release Python's lock. What a rank does is published (pretrain.blackboard).

A rank whose machine is gone publishes nothing any more; NCCL would wait for it. Rank 0 looks at all ranks' signs of life, and
they at rank 0's.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from pretrain import notify, processes
from pretrain.blackboard import Blackboard
from pretrain.progress import Progress

MAX_TICK_S = 5.0
SILENCE_S = 45.0
"""Without a sign of life after which a rank counts as dead: so the others end within a minute."""
STOPPED_S = 5.0
"""That a thread wakes up too late by where its process was stopped meanwhile."""
COLLECTIVES = (f"torch{os.sep}distributed{os.sep}", f"deepspeed{os.sep}comm{os.sep}")
"""Files of functions that a rank waits in for other ranks."""


class Watchdog:
    """Of one rank; torch.distributed must run. Threads apart, nothing of it is in the way of training.

    timeout_s: how long a phase may take; 0 only publishes who lives. tell: given event, step and what is said (pretrain.notify).
    """

    def __init__(self, progress: Progress, timeout_s: float, tell: Callable[[notify.Event, int, str], None] | None = None):
        self.progress, self.timeout_s, self.tell = progress, timeout_s, tell
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.tick_s = min(MAX_TICK_S, timeout_s / 4) if timeout_s else MAX_TICK_S
        self._training = threading.get_ident()
        self._machine = processes.machine()
        self._beat = 0
        self._heard: dict[int, tuple[int | None, float]] = {}
        """rank -> its last beat, and when it was new here."""
        self._answered = time.monotonic()
        """When the store did so last."""
        self._ended, self._stopped = threading.Event(), threading.Event()
        self._blackboard = Blackboard()
        self._publish()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._watch, "watchdog"), (self._notice_stops, "stops"))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """This rank's part is done in order."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._publish(done=True)

    def alarm(self, event: notify.Event, text: str, alone: bool) -> None:
        """Tell people of the end of this run: the first rank that asks does, with its reason, and none after it. For any thread.

        alone: tell it also where no other rank can be asked, since the store does not answer.
        """
        if self.tell is None:
            return
        first = self._blackboard.first("alarm")
        if alone if first is None else first:
            self.tell(event, self.progress.now.step, text)

    @property
    def speaks(self) -> bool:
        """Whether this rank does for all where the store is gone, most likely with rank 0's machine: the first one of the next."""
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.rank == (local if local < self.size else 0)

    def lost(self) -> list[int]:
        """Ranks on this machine whose process is gone without having done its part."""
        return [rank for rank, state in self._blackboard.states(range(self.size)).items() if state and self._is_gone(state)]

    def _is_gone(self, state: dict) -> bool:
        if state["done"] or state["machine"] != self._machine:
            return False
        try:
            return processes.started(state["pid"]) is None
        except OSError:
            return False

    def _notice_stops(self) -> None:
        """Where this process was stopped, by Slurm or a debugger, so were the others: all of them go on now.

        A thread that does nothing else: the one that watches may have been stopped in the middle of a look.
        """
        begun = time.monotonic()
        while not self._ended.wait(self.tick_s):
            if time.monotonic() - begun > self.tick_s + STOPPED_S:
                self.progress.renew()
                self._stopped.set()
            begun = time.monotonic()

    def _watch(self) -> None:
        stood = False
        while not self._ended.wait(self.tick_s):
            if self._stopped.is_set():
                self._stopped.clear()
                self._heard.clear()
            self._beat += 1
            self._publish()
            if not self.timeout_s:
                continue
            # Twice: after a stop the other thread is to say so first.
            stands, stood = stood, self.progress.standing_s > self.timeout_s
            if (stands and stood) or self._blackboard.has("hang"):
                self._end()
            elif silent := self._silent():
                self._leave(silent)

    def _silent(self) -> dict[int, str]:
        """rank -> the host of those without a sign of life for too long. Each rank asks for one other, rank 0 for all of them."""
        found: dict[int, str] = {}
        states = self._blackboard.states(range(1, self.size) if self.rank == 0 else [0])
        now = time.monotonic()
        if self.rank and not states and self._waits() and self._is_stuck_since(self._answered):
            # The store is gone, with the machine of rank 0 or with the launcher alone: that one is not needed any more.
            found[0] = "with the launcher's store"
        if not states:
            return found
        if now - self._answered > SILENCE_S / 2:
            # Nobody could be heard meanwhile.
            self._heard.clear()
        self._answered = now
        for rank, state in states.items():
            beat = state["beat"] if state else None
            if rank not in self._heard or beat != self._heard[rank][0] or (state and state["done"]):
                self._heard[rank] = (beat, now)
            elif self._is_stuck_since(self._heard[rank][1]):
                found[rank] = state["host"] if state else "unknown host"
        return found

    def _is_stuck_since(self, then: float) -> bool:
        """Whether that is long ago, and this rank has begun nothing new for as long: a healthy run is not ended for a lost connection."""
        now = time.monotonic()
        return min(now - then, now - self.progress.now.since) > SILENCE_S

    def _leave(self, silent: dict[int, str]) -> None:
        """The processes of other ranks are gone: they cannot come back to a collective, whatever this rank waits for."""
        names = ", ".join(f"rank {rank} ({host})" for rank, host in sorted(silent.items()))
        told = f"rank {self.rank}: ends {self.progress.now}, there was no sign of life for {SILENCE_S:.0f} s from {names}"
        _print(told)
        # The others then end at once.
        self._blackboard.write("hang", "1")
        self.alarm("failure", told, self.speaks)
        notify.linger()
        os._exit(1)

    def _end(self) -> None:
        """Say where this rank is, after those that the others wait for, and leave."""
        self._blackboard.write("hang", "1")
        before = self._blackboard.states(range(self.size))
        # Who lives beats again within this time, those included that have come here as well.
        for _ in range(3):
            if self._ended.wait(self.tick_s):
                return
            self._beat += 1
            self._publish()
        culprits = self._culprits(before)
        # Ranks come here up to a look apart.
        if culprits and self.rank not in culprits:
            time.sleep(self.tick_s + min(2.0, self.timeout_s))
        doing, host = self.progress.now, socket.gethostname()
        waited = time.monotonic() - doing.since
        told = f"rank {self.rank} ({host}): no progress for {waited:.0f} s {doing}{self._told(culprits)}"
        self._say(told)
        self.alarm("stall", told, self.speaks)
        # The launcher ends the others as soon as one has ended: before they have said where they are.
        time.sleep(2 * self.tick_s + min(3.0, self.timeout_s))
        notify.linger()
        os._exit(1)

    def _told(self, culprits: dict[int, str]) -> str:
        if self.rank in culprits:
            return "; the others wait for this rank" if self.size > 1 else ""
        if not culprits:
            return "; no rank is behind the others: see their stacks"
        return f"; waiting for ranks {sorted(culprits)}: " + "; ".join(f"rank {rank} {what}" for rank, what in sorted(culprits.items()))

    def _culprits(self, before: dict[int, dict | None]) -> dict[int, str]:
        """rank -> what it does: those that do not answer, else those behind the others, else those that wait for nobody."""
        now = self._blackboard.states(range(self.size))
        silent = [rank for rank in now if rank != self.rank and (now[rank] is None or self._is_silent(before.get(rank), now[rank]))]
        if silent:
            return {rank: f"does not answer, last heard of {now[rank]['doing']}" if now[rank] else "never answered" for rank in silent}
        at_work = {rank: state for rank, state in now.items() if not state["waits"]}
        if at_work:
            now = at_work
        if not now:
            return {}
        least = min((state["step"], state["count"]) for state in now.values())
        behind = {rank: state["doing"] for rank, state in now.items() if (state["step"], state["count"]) == least}
        return behind if len(behind) < self.size else {}

    def _is_silent(self, before: dict | None, now: dict) -> bool:
        return not now["done"] and before is not None and before["beat"] == now["beat"]

    def _say(self, text: str) -> None:
        _print(text + "; its stack:")
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
            "pid": os.getpid(), "host": socket.gethostname(), "machine": self._machine,
        }  # fmt: skip
        self._blackboard.write_state(self.rank, state)


def _print(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
