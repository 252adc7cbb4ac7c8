"""The examination of one node, in order: itself first, then with the others. It ends within its time whatever happens."""

import contextlib
import faulthandler
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.preflight import files, health
from pretrain.preflight.meeting import MARGIN_S, Meeting, Unreached, rounds
from pretrain.preflight.report import Report, this_start
from pretrain.preflight.workers import Workers

ALONE, ARRIVAL = 0.35, 0.5
"""Of the time there is: for what a node looks at alone, and until when the first one waits for the others."""
PHASE, SHORTEST_PHASE_S, LONGEST_PHASE_S = 0.08, 3.0, 20.0
"""Of it, for one measurement with others."""
ABORT_S = 2.0
"""For a process to notice that the time of a collective is over; then it is killed."""
SPARES = 3
"""Sets of processes, idle until another set has lost some."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `python -m pretrain.preflight node`."""

    report: Path
    nodes: list[str]
    node: str
    address: str
    port: int
    devices: int
    device: str
    run_directory: Path
    data: Path | None
    scratch: Path | None
    free_bytes: int
    timeout_s: float

    @property
    def phase_s(self) -> float:
        return min(LONGEST_PHASE_S, max(SHORTEST_PHASE_S, PHASE * self.timeout_s))


def examine(settings: Settings) -> Report:
    """Write the report, and return it as it was written last. Raises OSError where it cannot be written; the others do not wait then."""
    # A thread of C's, which ends the process also where it hangs in a driver; what was being done is in the report.
    faulthandler.dump_traceback_later(settings.timeout_s, exit=True, file=sys.__stderr__)
    examination = _Examination(settings)
    try:
        examination.alone()
        examination.together()
        examination.finish()
    finally:
        examination.end()
        faulthandler.cancel_dump_traceback_later()
    return examination.report


class _Examination:
    def __init__(self, settings: Settings):
        self.settings, self.begun = settings, time.monotonic()
        self.report = Report(node=settings.node, start=this_start(), timeout_s=settings.timeout_s)
        self._enter("importing torch")
        self.workers = Workers(settings.devices)
        # Whoever lacks its partner may hang in NCCL and has to be killed, which is not its own node's fault.
        self._spare = [Workers(settings.devices) for _ in range(SPARES)] if len(settings.nodes) > 1 else []
        self._fit: list[int] = []
        """Devices that have passed what a node looks at alone."""
        self.imported = time.monotonic()
        self._looking: list[_Look] = []
        self.meeting: Meeting | None = None

    def _enter(self, doing: str) -> None:
        self.report.doing, self.report.seconds = doing, time.monotonic() - self.begun
        # A node that does not see the directory is told by the last time; the others' figures need it nevertheless.
        with contextlib.suppress(OSError):
            self.report.write(self.settings.report)

    def _left(self, part: float) -> float:
        """Seconds until this part of the time is over that was there when torch had been imported, which may take most of a minute."""
        there = self.settings.timeout_s - (self.imported - self.begun)
        return max(SHORTEST_PHASE_S, part * there - (time.monotonic() - self.imported))

    def alone(self) -> None:
        """Disks and shards in threads of their own, which may hang; devices meanwhile."""
        settings, report = self.settings, self.report
        folders = dict.fromkeys(path for path in (settings.run_directory, settings.scratch) if path is not None)
        looks = [(f"the disk of {path}", lambda path=path: files.probe_disk(path, settings.free_bytes)) for path in folders]
        if settings.data is not None:
            looks.append((f"the shards of {settings.data}", lambda: files.read_shards(settings.data)))
        self._enter("looking at disks, shards and devices")
        self._looking = [_Look(what, action) for what, action in looks]
        self._devices()
        for look in self._looking:
            look.wait(self._left(ALONE))
            report.problems += look.problems
        for path, look in zip(folders, self._looking, strict=False):
            if look.value is not None:
                report.disks[str(path)] = look.value
        if settings.data is not None:
            report.manifest = self._looking[-1].value or ""

    def _devices(self) -> None:
        kind, report, limit = self.settings.device, self.report, self._left(ALONE)
        if kind == "cuda":
            if not health.can_ask():
                told = "nvidia-ml-py is not installed: the driver's counts of errors are not looked at"
                print(f"preflight: {report.node}: {told}", file=sys.stderr)
            self._ask_driver(health.foreign)
        counted = self._ask("count", limit, lambda index: (kind,))
        found = next((value for value in counted.values() if value is not None), 0 if kind == "cuda" else self.settings.devices)
        if found < self.settings.devices:
            report.problems.append(f"torch finds {found} GPUs, {self.settings.devices} are needed: see nvidia-smi there")
            self.workers.alive = [index for index in self.workers.alive if index < found]
        for index, result in self._ask("compute", self._left(ALONE), lambda index: (index, kind)).items():
            report.device = report.device or result["name"]
            report.tflops[self._name(index)] = result["tflops"]
            if result["wrong"]:
                report.problems.append(
                    f"{self._name(index)} computes wrongly: {result['wrong']} of {result['rows']} rows of a matrix product differ"
                )
                self.workers.alive.remove(index)
        if kind == "cuda":
            self._ask_driver(health.read)
        if len(self.workers.alive) > 1:
            self._enter("all-reduce among the devices of the node")
            with tempfile.TemporaryDirectory() as folder:
                meet = {"file": f"{folder}/store"}
                report.in_node_gbps = self._all_reduce(
                    lambda index: meet, list(self.workers.alive), 0, len(self.workers.alive), "its devices"
                )

    def _ask_driver(self, question: Callable[[int], list[health.Reading]]) -> None:
        look = _Look("NVIDIA's driver", lambda: question(self.settings.devices), remedy="is a GPU gone?")
        look.wait(self._left(ALONE))
        self.report.problems += look.problems
        for index, reading in enumerate(look.value or []):
            self.report.problems += health.problems(index, reading)

    def _all_reduce(self, meet: Callable[[int], dict], members: list[int], first: int, size: int, others: str) -> float:
        """GB/s; 0 where it fails, which is told as a problem of the node where it is one among its own devices."""
        limit = self.settings.phase_s
        answers = self.workers.ask(
            "all_reduce", limit + ABORT_S,
            lambda index: (index, self.settings.device, meet(index), first + members.index(index), size, limit), of=members,
        )  # fmt: skip
        failed = {index: answer.failure for index, answer in answers.items() if answer.failure}
        if not failed and answers:
            return min(answer.value for answer in answers.values())
        for index in failed:
            # torch counts a group that did not come about, and names the next one otherwise than the others do.
            self.workers.give_up(index)
        why = "; ".join(f"{self._name(index)}: {text}" for index, text in list(failed.items())[:2])
        if others in self.settings.nodes:
            self.report.failures[others] = why
        else:
            self.report.problems.append(f"the all-reduce among {others} failed ({why})")
        return 0.0

    def _ask(self, question: str, limit_s: float, arguments: Callable[[int], tuple]) -> dict[int, Any]:
        """Answers of those that gave one; a failure is a problem of the node."""
        answers = self.workers.ask(question, limit_s, arguments)
        for index, answer in answers.items():
            if answer.failure:
                self.report.problems.append(f"{self._name(index)} failed: {answer.failure}")
                if index in self.workers.alive:
                    self.workers.alive.remove(index)
        return {index: answer.value for index, answer in answers.items() if not answer.failure}

    def _name(self, index: int) -> str:
        return f"GPU {index}" if self.settings.device == "cuda" else f"CPU process {index}"

    def together(self) -> None:
        """Clocks and pairs, with whoever came."""
        settings, report = self.settings, self.report
        if len(settings.nodes) < 2:
            return
        try:
            self._enter("meeting the other nodes")
            self.meeting = Meeting(settings.nodes, settings.node, settings.address, settings.port, self._left(ARRIVAL))
            self._fit = list(self.workers.alive)
            self.meeting.come(len(self._fit), self._left(ARRIVAL))
            report.members = list(self.meeting.members)
            self._enter("comparing clocks with the other nodes")
            report.clock_s = self.meeting.clock(settings.phase_s)
            self._enter("all-reduce with other nodes")
            self._pairs(self.meeting)
            # Half of the time that is left, for those that are slow: the first node takes the store with it.
            self.meeting.leave(max(settings.phase_s, self._left(1.0) / 2))
        except Unreached as error:
            report.unreached = str(error)

    def _pairs(self, meeting: Meeting) -> None:
        devices = dict(meeting.members)
        for turn, pairs in enumerate(rounds([node for node in devices if devices[node]])):
            if self._left(1.0) < 2 * self.settings.phase_s:
                # Others have taken it all: what is known by now is told.
                return
            if not set(self._fit) <= set(self.workers.alive) and self._spare:
                self.workers.end()
                self.workers = self._spare.pop()
            ready = len(set(self._fit) & set(self.workers.alive))
            said = meeting.wait_for_others(f"round {turn}", self.settings.phase_s + ABORT_S + MARGIN_S, str(ready))
            pair = next((pair for pair in pairs if self.settings.node in pair), None)
            if pair is None or not set(pair) <= set(meeting.present):
                continue
            other = pair[1 - pair.index(self.settings.node)]
            if any(int(said[node]) < devices[node] for node in pair):
                # Of one that has lost processes in earlier rounds nothing new would be found out.
                continue
            members, size = self._fit, devices[pair[0]] + devices[pair[1]]
            meet = {"address": self.settings.address, "port": self.settings.port, "prefix": f"pair {turn} {' '.join(pair)}"}
            first = 0 if self.settings.node == pair[0] else devices[pair[0]]
            self.report.pairs[other] = self._all_reduce(lambda index, meet=meet: meet, list(members), first, size, other)

    def finish(self) -> None:
        self.report.done = True
        self._enter("ended")
        self.report.write(self.settings.report)

    def end(self) -> None:
        for workers in (self.workers, *self._spare):
            with contextlib.suppress(OSError):
                workers.end()


class _Look:
    """At something that may never answer, in a thread that is left behind then."""

    def __init__(self, what: str, action: Callable[[], Any], remedy: str = "is the file system gone?"):
        self.what, self.remedy, self.problems, self.value = what, remedy, [], None
        self._action, self._begun = action, time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._action()
        except Exception as error:
            # Whatever it is: what could not be looked at is not good.
            self.problems.append(str(error) or type(error).__name__)

    def wait(self, limit_s: float) -> None:
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self.problems = [f"{self.what}: no answer within {time.monotonic() - self._begun:.0f} s: {self.remedy}"]
