"""The run's own copy of the code: RUN_DIR/code, made at the first start, from which every later start runs.

A job waits for days and is started again for weeks; meanwhile its user goes on editing. code.json in the copy says where it comes
from, and code.diff what was not committed then.
"""

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from data_tools.files import make_directories, sync
from pretrain.tracking.environment import CODE_RECORD

NAME = "code"
DIFF_NAME = "code.diff"
PACKAGES = ("megatron_qsparse", "pretrain", "data_tools", "slurm")
"""What is copied where git cannot tell: an installed package or an unpacked archive."""
GIT_TIMEOUT_S = 60
MAX_FILE_BYTES = 8 << 20
"""An untracked file above that is no source."""


@dataclass(frozen=True)
class Snapshot:
    path: Path
    made: bool
    """By this call."""
    differs: bool
    """From the checkout, which a start with UPDATE_CODE=1 would take."""


def take(source: Path, run_directory: Path, update: bool = False) -> Snapshot:
    """Copy the code of `source` into the run directory, unless there is a copy. Raises OSError.

    update: replace a copy that is there; it is kept as code.N. Files that git does not track, and does not ignore, are code too.
    """
    target = run_directory / NAME
    if target.is_dir() and not update:
        return Snapshot(target, made=False, differs=not _same(source, target))
    if target.is_dir() and (source.resolve() == target.resolve() or _same(source, target)):
        return Snapshot(target, made=False, differs=False)
    make_directories(run_directory)
    partial = run_directory / f".{NAME}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for name in files(source):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, partial / name, follow_symlinks=False)
    _describe(source, partial)
    if target.is_dir():
        number = 1
        while (run_directory / f"{NAME}.{number}").exists():
            number += 1
        target.rename(run_directory / f"{NAME}.{number}")
    partial.rename(target)
    sync(run_directory)
    return Snapshot(target, made=True, differs=False)


def files(source: Path) -> list[str]:
    """Relative names of what belongs to the code, sorted."""
    listed = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        names = [name for name in listed.split("\0") if name]
    else:
        found = (path for package in PACKAGES for path in (source / package).rglob("*"))
        names = [str(path.relative_to(source)) for path in found if "__pycache__" not in path.parts]
    return sorted(name for name in names if (source / name).is_file() and (source / name).stat().st_size <= MAX_FILE_BYTES)


def _same(source: Path, copy: Path) -> bool:
    """Whether the packages of both hold the same bytes: notes and tests may differ."""
    return _contents(source) == _contents(copy)


def _contents(folder: Path) -> dict[str, bytes]:
    found = (path for package in PACKAGES for path in (folder / package).rglob("*"))
    kept = [path for path in found if path.is_file() and "__pycache__" not in path.parts and path.name != "site.env"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def _describe(source: Path, copy: Path) -> None:
    commit, difference = _git(source, "rev-parse", "HEAD"), _git(source, "diff", "HEAD", "--binary")
    known = {"git.commit": commit.strip(), "git.dirty": str(bool(_git(source, "status", "--porcelain"))).lower()} if commit else {}
    if difference:
        (copy / DIFF_NAME).write_text(difference)
    made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    (copy / CODE_RECORD).write_text(json.dumps({"source": str(source.resolve()), "copied": made, **known}, indent=1) + "\n")


def _git(folder: Path, *arguments: str) -> str | None:
    """Output; None where `folder` is not the top of a checkout, or there is no git."""
    if not (folder / ".git").exists():
        return None
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", check=True, timeout=GIT_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return None
