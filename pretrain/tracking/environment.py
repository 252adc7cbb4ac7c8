"""Where a run came from: commit, machine, package versions, Slurm job. Goes into the run's tags."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "megatron-core", "transformer-engine", "triton", "mlflow", "webdataset", "numpy")
GIT_TIMEOUT_S = 10.0
CODE_RECORD = "code.json"
"""At the top of a copy of the code without its git checkout: where it comes from (pretrain.job.snapshot)."""


def collect_environment() -> dict[str, str]:
    """Flat names and values that describe the machine and the code; never raises.

    `git.commit` and `git.dirty` are there when the sources lie in a git checkout or a job's copy of one, `slurm.*` inside a Slurm
    job, `cuda` and `devices` once torch has been imported by the caller (importing it here would cost seconds for nothing).
    """
    return {
        **_git(Path(__file__).resolve().parent),
        "hostname": platform.node(),
        "user": _user(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "command": " ".join(sys.argv),
        **{f"version.{name}": version for name in PACKAGES if (version := _version(name))},
        **{f"slurm.{name[6:].lower()}": value for name, value in sorted(os.environ.items()) if name in SLURM_VARIABLES},
        **_devices(),
    }


SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NAME",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_CLUSTER_NAME",
)


def _git(folder: Path) -> dict[str, str]:
    copied = _copied(folder)
    if copied:
        return copied

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S).stdout.strip()

    try:
        # An installed package may lie inside somebody else's checkout (a virtual environment in it): not our commit.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {}


def _copied(folder: Path) -> dict[str, str]:
    try:
        record = json.loads((folder.parents[1] / CODE_RECORD).read_text())
        return {name: str(record[name]) for name in ("git.commit", "git.dirty") if name in record}
    except (OSError, ValueError, TypeError):
        return {}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user without a name
        return str(os.getuid())


def _devices() -> dict[str, str]:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return {"devices": f"{len(names)} x {names[0]}" if len(set(names)) == 1 else ", ".join(names), "cuda": str(torch.version.cuda)}
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    return {"devices": f"{os.cpu_count()} x {model.group(1) if model else platform.machine()}"}
