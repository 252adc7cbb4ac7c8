"""A real Slurm cluster on this machine, thrown away afterwards: munged, slurmctld and a slurmd for each virtual node.

Everything lies in one folder; nothing is written to /etc, /var or /run, and no systemd, cgroups or root are needed. Each slurmd has
a host name and an /etc/hosts of its own (namespaces), so `scontrol show hostnames | head -1` is an address, as on a cluster.
GPUs are links to /dev/null: Slurm counts and hands them out, nothing more. As root the cluster has a network namespace of its own, with
the loopback device alone: like compute nodes without internet, nothing in it has a route out.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.slurm.configuration import CONFIGURATION, LOOPBACK, PARTITIONS

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
UP_S = 30
CLIENT_S = 60
"""A client that finds nobody to answer waits for ever."""
CANCEL_S = 20
SMALL_DISK_BYTES = 1 << 20
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL", "PREEMPTED")


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [name for name in COMMANDS if not shutil.which(name, path=PATH)]
    return f"no {', '.join(absent)}: Debian's packages slurmctld slurmd slurm-client munge have them" if absent else None


class Cluster:
    """Nodes node1 ... nodeN. A context manager: up on entering, down on leaving.

    settings: further lines of slurm.conf. plugin: a SPANK plugin that srun loads.
    """

    def __init__(self, nodes: int = 3, cpus: int = 4, gpus: int = 8, memory_mb: int = 8000, settings: str = "", plugin: Path | None = None):
        # munged wants every folder above its socket to be searchable, and sockets want short paths.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm.", dir="/tmp"))
        self.folder.chmod(0o711)
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.cpus, self.gpus, self.memory_mb, self.settings, self.plugin = cpus, gpus, memory_mb, settings, plugin
        self.port = _free_ports(nodes + 1)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment |= {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.small_disk = self.folder / "small_disk"
        """As root: a file system that is soon full."""
        self._network: subprocess.Popen | None = None
        self._before: list[str] = []
        """What puts a command into the network namespace."""

    def __enter__(self) -> "Cluster":
        try:
            self._leave_network()
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._down()

    # What tests do with it.

    def client(self, *command: object, check: bool = True, timeout: float = CLIENT_S, **options) -> str:
        """Output of a command of Slurm's. Raises RuntimeError with it where the command fails."""
        environment = self.environment | options.pop("env", {})
        full = [*self._before, *(str(part) for part in command)]
        done = subprocess.run(
            full, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, **options
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def sbatch(self, *arguments: object, cwd: Path, env: dict[str, str] | None = None) -> str:
        """Submit; returns the job's id."""
        return self.client("sbatch", "--parsable", *arguments, cwd=cwd, env=env or {}).strip().splitlines()[-1].split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        fields = self.client("scontrol", "-o", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, timeout: float, states: tuple[str, ...] = ENDED) -> dict[str, str]:
        """The job once it is in one of these states. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.job(job)
            if found["JobState"] in states:
                return found
            time.sleep(0.2)
        raise TimeoutError(f"job {job} is {found['JobState']} ({found.get('Reason')}) after {timeout} s")

    def kill_node(self, name: str) -> None:
        """A crash: the node's daemon, its steps and everything below them vanish at once."""
        daemon = self.pid(f"slurmd.{name}")
        lost = [daemon, *self.steps(name)]
        below = [child.pid for pid in lost for child in psutil.Process(pid).children(recursive=True)]
        for pid in (*lost, *below):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        (self.folder / f"slurmd.{name}.pid").unlink()

    def start_node(self, name: str) -> None:
        """Bring a crashed node back; -b reports a boot, so that jobs that were lost with it are ended."""
        self._start(name, "-b")
        self._wait_until_idle()

    def resume(self) -> None:
        """Every node is ready again and no job is left, whatever a test has done."""
        self._cancel_all()
        for name in self.names:
            if not (self.folder / f"slurmd.{name}.pid").exists():
                self._start(name, "-b")
        self._wait_until_idle()

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-20:]) for path in sorted(self.folder.glob("*.log")))

    # How it comes and goes.

    def _leave_network(self) -> None:
        if os.geteuid() != 0:
            return
        self._network = subprocess.Popen(["unshare", "--net", sys.executable, "-c", LOOPBACK], stdout=subprocess.PIPE, text=True)
        if self._network.stdout.readline() != "up\n":
            raise RuntimeError("the loopback device of a new network namespace did not come up")
        self._before = ["nsenter", f"--net=/proc/{self._network.pid}/ns/net"]

    def _up(self) -> None:
        if os.geteuid() == 0:
            # Before the nodes start, which see no mount that comes later.
            self.small_disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}", "tmpfs", self.small_disk], check=True)
        self._write_configuration()
        d = self.folder
        self._daemon("munged", f"--socket={d}/munge.sock", f"--key-file={d}/munge.key", f"--pid-file={d}/munged.pid",
                     f"--log-file={d}/munged.log", f"--seed-file={d}/munge.seed")  # fmt: skip
        self._daemon("slurmctld", "-f", str(d / "slurm.conf"), "-c")
        for name in self.names:
            self._start(name)
        self._wait_until_idle()

    def _write_configuration(self) -> None:
        d, count = self.folder, len(self.names)
        (d / "state").mkdir()
        for name in self.names:
            (d / f"spool.{name}").mkdir()
        (d / "munge.key").write_bytes(secrets.token_bytes(1024))
        (d / "munge.key").chmod(0o600)
        (d / "hosts").write_text(
            f"127.0.0.1 localhost {socket.gethostname()}\n" + "".join(f"127.0.0.{10 + i} node{i}\n" for i in range(1, count + 1))
        )
        (d / "plugstack.conf").write_text(f"required {self.plugin}\n" if self.plugin else "")
        devices = ""
        if self.gpus:
            (d / "gpu").mkdir()
            for index in range(self.gpus):
                (d / "gpu" / f"gpu{index}").symlink_to("/dev/null")
            files = f"{d}/gpu/gpu[0-{self.gpus - 1}]"
            (d / "gres.conf").write_text("".join(f"NodeName={name} Name=gpu File={files}\n" for name in self.names))
            devices = f"Gres=gpu:{self.gpus}"
        nodes = "".join(
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.{10 + i} Port={self.port + i} CPUs={self.cpus} "
            f"RealMemory={self.memory_mb} {devices} State=UNKNOWN\n"
            for i, name in enumerate(self.names, start=1)
        )
        text = CONFIGURATION.format(folder=d, user=_user(), port=self.port, gres="GresTypes=gpu" if self.gpus else "")
        (d / "slurm.conf").write_text(f"{text}{nodes}{PARTITIONS}{self.settings}\n")

    def _daemon(self, *command: str) -> None:
        log = self.folder / f"{command[0]}.start"
        with log.open("w") as out:
            done = subprocess.run([*self._before, *command], env=self.environment, stdout=out, stderr=subprocess.STDOUT, timeout=UP_S)
        if done.returncode:
            raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()}\n{self.logs()}")

    def _start(self, name: str, *more: str) -> None:
        user = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
        inside = f'mount --bind {self.folder}/hosts /etc/hosts && hostname {name} && exec slurmd "$@"'
        self._daemon(
            "unshare",
            *user,
            "--mount",
            "--propagation",
            "slave",
            "--uts",
            "bash",
            "-c",
            inside,
            "slurmd",
            *more,
            "-f",
            f"{self.folder}/slurm.conf",
            "-N",
            name,
        )

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline:
            idle = self.client("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N", check=False).split()
            if sorted(set(idle)) == sorted(self.names):
                return
            time.sleep(0.1)
        raise TimeoutError(f"{self.client('sinfo', '-N', '-l', check=False)}\n{self.logs()}")

    def _cancel_all(self) -> None:
        deadline = time.monotonic() + 2 * CANCEL_S
        while self.client("squeue", "-h").strip():
            if time.monotonic() > deadline:
                raise TimeoutError(f"jobs do not end:\n{self.client('squeue')}\n{self.logs()}")
            # A job that traps TERM has KillWait to end.
            late = ["--signal=KILL", "--full"] if time.monotonic() > deadline - CANCEL_S else []
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.client("scancel", *late, "--user", _user(), check=False, timeout=5)
            time.sleep(0.3)

    def steps(self, name: str) -> list[int]:
        """slurmstepd of the node: they are nobody's children, and keep the node's log open."""
        log = self.folder / f"slurmd.{name}.log"
        found = []
        for process in psutil.process_iter(["name"]):
            if process.info["name"] == "slurmstepd":
                with contextlib.suppress(psutil.Error, OSError):
                    if any(file.path == str(log) for file in process.open_files()):
                        found.append(process.pid)
        return found

    def pid(self, daemon: str) -> int:
        return int((self.folder / f"{daemon}.pid").read_text())

    def _down(self) -> None:
        with contextlib.suppress(Exception):
            self._cancel_all()
        for name in self.names:
            for pid in self.steps(name):
                _end(pid)
        for daemon in (*(f"slurmd.{name}" for name in self.names), "slurmctld", "munged"):
            with contextlib.suppress(FileNotFoundError):
                _end(self.pid(daemon))
        if self._network is not None:
            self._network.kill()
            self._network.wait()
        if self.small_disk.is_mount():
            subprocess.run(["umount", "--lazy", self.small_disk])
        shutil.rmtree(self.folder, ignore_errors=True)


def _user() -> str:
    return subprocess.check_output(["id", "-un"], text=True).strip()


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on now."""
    for _ in range(100):
        first = 20000 + secrets.randbelow(9000)
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError):
            for port in range(first, first + count):
                sockets.enter_context(socket.socket()).bind(("", port))
            return first
    raise RuntimeError(f"no {count} free ports in a row")


def _end(pid: int) -> None:
    """TERM, wait, KILL."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        process.terminate()
        deadline = time.monotonic() + 5
        # Nobody may wait for a daemon that has ended.
        while time.monotonic() < deadline and process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            process.kill()
