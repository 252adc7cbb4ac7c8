"""What can be wrong with one node of the cluster."""

import contextlib
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.slurm.cluster import Cluster


@contextlib.contextmanager
def hidden(cluster: Cluster, name: str, folder: Path) -> Iterator[None]:
    """The folder is empty on this node. Needs root."""
    inside = ["nsenter", "--mount", f"--target={cluster.pid(f'slurmd.{name}')}"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run([*inside, "umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def slowed(cluster: Cluster, name: str, command: str, stopped_s: float = 0.1) -> Iterator[None]:
    """Processes of this node with that in their command line are stopped for so long, then run for a tenth of that, and so on."""
    ended = threading.Event()
    thread = threading.Thread(target=_slow_down, args=(cluster, name, command, stopped_s, ended))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _slow_down(cluster: Cluster, name: str, command: str, stopped_s: float, ended: threading.Event) -> None:
    found: set[psutil.Process] = set()
    while not ended.is_set():
        _send(found, signal.SIGSTOP)
        began = time.monotonic()
        # While they are stopped, since looking takes its time.
        with contextlib.suppress(psutil.Error):
            below = [child for pid in cluster.steps(name) for child in psutil.Process(pid).children(recursive=True)]
            found |= {process for process in below if command in " ".join(process.cmdline())}
        _send(found, signal.SIGSTOP)
        ended.wait(max(0.05, stopped_s - (time.monotonic() - began)) if found else 0.05)
        _send(found, signal.SIGCONT)
        ended.wait(stopped_s / 10 if found else 0)


def _send(processes: set[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
