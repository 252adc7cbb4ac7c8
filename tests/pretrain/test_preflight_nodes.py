"""Nodes are processes, forked like training ranks, each with its own mounts where it is to see something else than the others."""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pretrain.preflight.cli import main
from pretrain.preflight.judge import BAD, read_reports
from pretrain.preflight.node import _Look
from tests.distributed import forking
from tests.pretrain.forked import _free_port

CLONE_NEWNS = 0x00020000
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount for a single process")


@dataclass(frozen=True)
class Node:
    """mounted: folder -> size in KiB of the empty file system that only this node has there."""

    name: str
    more: tuple[str, ...] = ()
    mounted: dict[str, int] = field(default_factory=dict)


def _examine(arguments: list[str], mounted: dict[str, int], log: str) -> None:
    """A node's process."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1")
    if mounted:
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        for folder, size in mounted.items():
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", folder], check=True)
    import torch

    torch.set_num_threads(1)
    sys.exit(main(arguments))


class Job:
    """The nodes at work. names: all there should be; `come` those that do. timeout: a long one, where nobody waits until it is over,
    allows for a node that does not get to run for some seconds."""

    def __init__(self, folder: Path, names: list[str], come: list[Node], *more: object, timeout: int = 200, devices: int = 1, run=None):
        self.folder, self.names, self.timeout = folder, names, timeout
        self.reports, self.run = folder / "reports", folder / "run"
        for path in (self.reports, self.run):
            path.mkdir()
        common = [
            *("node", "--report", self.reports, "--nodes", " ".join(names), "--address", "127.0.0.1", "--port", _free_port()),
            *("--devices", devices, "--device", "cpu", "--run-directory", self.run, "--timeout", timeout, *more),
        ]
        self.begun, context = time.monotonic(), forking()
        self.processes = {
            node.name: context.Process(
                target=run or _examine,
                args=([str(part) for part in (*common, "--node", node.name, *node.more)], node.mounted, str(folder / "log")),
            )
            for node in come
        }

    def __enter__(self) -> "Job":
        for process in self.processes.values():
            process.start()
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()

    def wait(self) -> float:
        """Seconds until all have ended, each in order."""
        for process in self.processes.values():
            process.join(self.timeout + 20)
        codes = {name: process.exitcode for name, process in self.processes.items()}
        assert set(codes.values()) == {0}, (codes, (self.folder / "log").read_text())
        return time.monotonic() - self.begun

    def judge(self, capsys, *more: object) -> tuple[int, list[str], list[str]]:
        """(exit status, lines, bad nodes as the file says)."""
        arguments = ["judge", "--report", self.reports, "--nodes", " ".join(self.names), "--timeout", self.timeout, *more]
        status = main([str(part) for part in arguments])
        lines = capsys.readouterr().out.splitlines()
        return status, lines, (self.reports / BAD).read_text().split()


FORGIVING = ("--fraction", 0.1)
"""These nodes share two cores with whatever else runs there."""


def test_three_good_nodes_and_the_command_line_of_one(shards, tmp_path, capsys):
    names = ["node1", "node2", "node3"]
    with Job(tmp_path, names, [Node(name) for name in names], "--data", shards, devices=2) as job:
        job.wait()
    status, lines, bad = job.judge(capsys, *FORGIVING)
    assert (status, bad) == (0, []), lines
    assert lines[0].split()[:3] == ["node", "devices", "TFLOP/s"] and [line.split()[:2] for line in lines[1:4]] == [[n, "2"] for n in names]
    assert lines[-1].startswith("preflight: 3 nodes, ") and ": all good | all-reduce " in lines[-1] and "| in a node " in lines[-1]
    reports, missing = read_reports(job.reports, names)
    assert not missing and all(report.members == names and report.done for report in reports.values())
    assert all(set(report.pairs) == set(names) - {name} and min(report.pairs.values()) > 0 for name, report in reports.items())
    assert len({report.manifest for report in reports.values()}) == 1 and reports["node1"].manifest
    assert not list(job.run.iterdir()), "the probe file is gone"
    # The real command of a single node, which meets nobody.
    for command in ("node --node a --address a --port 1 --devices 1 --device cpu --run-directory run", "judge"):
        arguments = [sys.executable, "-m", "pretrain.preflight", *command.split(), "--report", "reports", "--nodes", "a"]
        done = subprocess.run(arguments, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("preflight: 1 node, ") and done.stdout.splitlines()[-1].endswith(": all good")


@needs_root
def test_a_missing_mount_a_full_disk_and_a_node_that_never_comes_are_each_named(shards, tmp_path, capsys):
    """node2 does not see the shards, node3 has no room, node4 never comes; node1 is good, and nobody waits for all of the time."""
    names = ["node1", "node2", "node3", "node4"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    come = [Node("node1"), Node("node2", mounted={str(shards): 64}), Node("node3", mounted={str(scratch): 4096})]
    with Job(tmp_path, names, come, "--data", shards, "--scratch", scratch, timeout=40) as job:
        assert job.wait() < 40
    status, lines, bad = job.judge(capsys, *FORGIVING)
    assert status == 3 and bad == ["node2", "node3", "node4"], lines
    assert lines[0].startswith(f"bad node: node2: cannot read the manifest {shards}/manifest.json ("), lines
    assert lines[1] == f"bad node: node3: cannot write 16 MB in {scratch} (No space left on device): free space"
    assert lines[2] == "bad node: node4: did not report within 40 s"
    assert lines[-1].startswith("preflight: 4 nodes, ") and ": 3 bad: node2 node3 node4 | all-reduce " in lines[-1]
    reports, _ = read_reports(job.reports, names[:3])
    assert all(report.members == names[:3] and len(report.pairs) == 2 for report in reports.values()), "the joint checks took place"


@needs_root
def test_a_node_without_the_shared_directories_takes_part_and_ends_with_an_error(tmp_path, capsys):
    names = ["node1", "node2"]
    with Job(tmp_path, names, [Node("node1"), Node("node2", mounted={str(tmp_path): 64})]) as job:
        for process in job.processes.values():
            process.join(job.timeout)
    assert job.processes["node1"].exitcode == 0 and job.processes["node2"].exitcode == 1
    status, lines, bad = job.judge(capsys, *FORGIVING)
    assert status == 3 and bad == ["node2"] and lines[0] == "bad node: node2: took part, but left no report: does it see the directory?"


def _held_up(arguments: list[str], mounted: dict[str, int], log: str) -> None:
    """As `_examine`, of a node that is held up now and then where it is node2: from within, after some milliseconds of work, so that
    it is slow whatever else does not get to run."""
    import torch
    import torch.distributed as dist

    worked_s = 0.0

    def now_and_then(work):
        def held_up(*args, **kwargs):
            nonlocal worked_s
            # Before what is measured, here and by the partner; numbers by which they agree on going on are not.
            if worked_s > 0.008 and args[0].numel() > 1:
                time.sleep(min(2.0, 40 * worked_s))
                worked_s = 0.0
            begun = time.perf_counter()
            result = work(*args, **kwargs)
            worked_s += time.perf_counter() - begun
            return result

        return held_up

    if arguments[arguments.index("--node") + 1] == "node2":
        torch.mm, dist.all_reduce = now_and_then(torch.mm), now_and_then(dist.all_reduce)
    _examine(arguments, mounted, log)


def test_a_node_that_is_held_up_now_and_then_is_named(tmp_path, capsys):
    names = ["node1", "node2", "node3"]
    with Job(tmp_path, names, [Node(name) for name in names], run=_held_up) as job:
        job.wait()
    status, lines, bad = job.judge(capsys, "--fraction", 0.15)
    assert status == 3 and bad == ["node2"], lines
    assert any(
        line.startswith("bad node: node2: CPU process 0 computes slowly: ") and " TFLOP/s, the median of all is " in line for line in lines
    )
    assert any(line.startswith("bad node: node2: all-reduce with node") for line in lines), "slow, or not to be measured in time"


def _dying(arguments: list[str], mounted: dict[str, int], log: str) -> None:
    """As `_examine`, of a node that is killed when the pairs begin where it is node3."""
    from pretrain.preflight import node

    enter = node._Examination._enter

    def entering(examination, doing: str) -> None:
        enter(examination, doing)
        if doing == "all-reduce with other nodes" and examination.settings.node == "node3":
            os.killpg(0, signal.SIGKILL)

    node._Examination._enter = entering
    _examine(arguments, mounted, log)


def test_the_death_of_a_node_among_others_costs_one_wait(tmp_path, capsys):
    names = ["node1", "node2", "node3"]
    with Job(tmp_path, names, [Node(name) for name in names], timeout=60, run=_dying) as job:
        dead = job.processes.pop("node3")
        assert job.wait() < 60
        dead.join()
        assert dead.exitcode == -signal.SIGKILL
    status, lines, bad = job.judge(capsys, *FORGIVING)
    assert status == 3 and bad == ["node3"], lines
    assert lines[0].startswith("bad node: node3: did not end within 60 s: last heard of all-reduce with other nodes")


def test_a_file_system_that_does_not_answer_is_told_and_left_behind(tmp_path):
    """Opening a pipe that nobody writes to waits for ever, as a file does whose server is gone."""
    os.mkfifo(tmp_path / "pipe")
    look = _Look("the disk of x", lambda: (tmp_path / "pipe").read_text())
    look.wait(0.2)
    (problem,) = look.problems
    assert re.fullmatch(r"the disk of x: no answer within \d+ s: is the file system gone\?", problem), problem
    (tmp_path / "pipe").open("w").close()


def _hanging(arguments: list[str], mounted: dict[str, int], log: str) -> None:
    """As `_examine`, of a node whose all-reduces hang on both sides, as NCCL's do."""
    from pretrain.preflight import devices, workers

    def all_reduce(index: int, kind: str, meet: dict, *more) -> float:
        if "prefix" in meet and "node2" in meet["prefix"].split():
            time.sleep(3600)
        return devices.all_reduce(index, kind, meet, *more)

    workers.QUESTIONS["all_reduce"] = all_reduce
    _examine(arguments, mounted, log)


@pytest.mark.parametrize("count", [3, 5])
def test_of_pairs_that_hang_the_node_common_to_them_is_named_alone(count, tmp_path, capsys):
    names = [f"node{number}" for number in range(1, count + 1)]
    with Job(tmp_path, names, [Node(name) for name in names], timeout=45, run=_hanging) as job:
        job.wait()
    status, lines, bad = job.judge(capsys, *FORGIVING)
    assert status == 3 and bad == ["node2"], lines
    assert "bad node: node2: all-reduce with " in lines[0] and " failed (CPU process 0: no answer within " in lines[0]


def _raising(arguments: list[str], mounted: dict[str, int], log: str) -> None:
    """As `_examine`, of a node whose all-reduces with others fail at once, while its partners wait."""
    from pretrain.preflight import devices, workers

    def all_reduce(index: int, kind: str, meet: dict, *more) -> float:
        if "prefix" in meet and arguments[arguments.index("--node") + 1] == "node2":
            raise RuntimeError("a fault of this test")
        return devices.all_reduce(index, kind, meet, *more)

    workers.QUESTIONS["all_reduce"] = all_reduce
    _examine(arguments, mounted, log)


def test_a_node_whose_groups_fail_takes_no_other_with_it(tmp_path, capsys):
    names = ["node1", "node2", "node3", "node4"]
    with Job(tmp_path, names, [Node(name) for name in names], timeout=60, run=_raising) as job:
        job.wait()
    status, lines, bad = job.judge(capsys, *FORGIVING)
    assert status == 3 and bad == ["node2"], lines


def _clock_ahead(arguments: list[str], mounted: dict[str, int], log: str) -> None:
    """As `_examine`, of a node whose clock is wrong where it is node2."""
    if arguments[arguments.index("--node") + 1] == "node2":
        true = time.time
        time.time = lambda: true() + 9.0
    _examine(arguments, mounted, log)


def test_a_node_whose_clock_is_ahead_is_named(tmp_path, capsys):
    names = ["node1", "node2", "node3"]
    with Job(tmp_path, names, [Node(name) for name in names], run=_clock_ahead) as job:
        job.wait()
    status, lines, bad = job.judge(capsys, *FORGIVING)
    assert status == 3 and bad == ["node2"], lines
    assert lines[0].startswith("bad node: node2: clock is 9.0 s ahead of the median of the nodes")
