"""The run's own copy of the code and of the files of settings: RUN_DIR/code, made at the first start, from which every later start runs.

A job waits for days and is started again for weeks; meanwhile its user goes on editing. code.json in the copy says where it comes
from, and code.diff what was not committed then.
"""

import hashlib
import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.files import make_directories, sync
from pretrain.tracking.environment import CODE_RECORD

NAME = "code"
DIFF_NAME = "code.diff"
CONFIGS = "configs"
"""In the copy: what --config names."""
PACKAGES = ("megatron_qsparse", "pretrain", "data_tools", "slurm")
"""What is copied where git cannot tell: an installed package or an unpacked archive."""
GIT_TIMEOUT_S = 60
SOURCES = (
    ".py", ".sh", ".yaml", ".yml", ".json", ".toml", ".cfg", ".env", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".html", ".css", ".js"
)  # fmt: skip
MAX_UNTRACKED_BYTES = 8 << 20
"""A file that git does not track is code where it is one of these kinds, and not larger."""


@dataclass(frozen=True)
class Snapshot:
    path: Path
    made: bool
    """By this call."""
    kept: str = ""
    """Name of the copy before, where there was one."""
    differs: tuple[str, ...] = ()
    """What the copy differs from, which a start with UPDATE_CODE=1 would take: the checkout, files of settings."""


def take(source: Path, run_directory: Path, update: bool = False, configs: Sequence[str] = ()) -> Snapshot:
    """Copy the code of `source` into the run directory, unless there is a copy.

    Raises OSError, and ValueError where files of a copy are gone.

    update: replace a copy that is there; it is kept as code.N. configs: files of settings, as they were named; one that the copy lacks
    is added to it. Files that git does not track, and does not ignore, are code too.
    """
    target = run_directory / NAME
    configs = [name for name in configs if not Path(name).resolve().is_relative_to(target.resolve())]
    if target.is_dir():
        if not update and (lost := _lost(target)):
            raise ValueError(f"{target} is not complete, {lost} is missing: UPDATE_CODE=1 replaces it")
        differing = _differing(source, target, configs)
        if not (update and (differing or _lost(target))) or source.resolve() == target.resolve():
            for name in configs:
                if not config_copy(target, name).exists():
                    _copy_config(name, target)
            return Snapshot(target, made=False, differs=tuple(differing))
    make_directories(run_directory)
    # Another job may begin the same run at the same moment.
    partial = run_directory / f".{NAME}.{secrets.token_hex(4)}.partial"
    try:
        _make(source, partial, configs)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    kept = _put_aside(target) if update and target.is_dir() else ""
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not target.is_dir():
            raise
        return Snapshot(target, made=False)
    sync(run_directory)
    return Snapshot(target, made=True, kept=kept)


def _make(source: Path, partial: Path, configs: Sequence[str]) -> None:
    for name in files(source):
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, partial / name, follow_symlinks=False)
    for name in configs:
        _copy_config(name, partial)
    _describe(source, partial)


def _put_aside(target: Path) -> str:
    """Under the next name that is free, which is returned."""
    number = 1
    while (target.parent / f"{NAME}.{number}").exists():
        number += 1
    target.rename(target.parent / f"{NAME}.{number}")
    return f"{NAME}.{number}"


def _lost(copy: Path) -> str | None:
    """The first file of the copy that is not there any more; None where all are."""
    try:
        names = json.loads((copy / CODE_RECORD).read_text()).get("files", [])
    except FileNotFoundError:
        return CODE_RECORD
    except (OSError, ValueError, AttributeError):
        return None
    return next((name for name in names if not (copy / name).exists()), None)


def config_copy(code: Path, name: str) -> Path:
    """Where the copy keeps the file that was called so; slurm/lib/launch.sh looks for it by the same rule."""
    path = Path(name)
    return code / CONFIGS / f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{path.name}"


def _copy_config(name: str, code: Path) -> None:
    copy = config_copy(code, name)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(name, copy)


def files(source: Path) -> list[str]:
    """Relative names of what belongs to the code, sorted."""
    tracked = _git(source, "ls-files", "-z", "--cached")
    if tracked is None:
        found = (path for package in PACKAGES for path in (source / package).rglob("*"))
        return sorted(str(path.relative_to(source)) for path in found if "__pycache__" not in path.parts and path.is_file())
    names = [name for name in tracked.decode(errors="surrogateescape").split("\0") if name]
    others = _git(source, "ls-files", "-z", "--others", "--exclude-standard") or b""
    for name in others.decode(errors="surrogateescape").split("\0"):
        if name.endswith(SOURCES) and (source / name).is_file() and (source / name).stat().st_size <= MAX_UNTRACKED_BYTES:
            names.append(name)
    return sorted(name for name in names if (source / name).is_file())


def _differing(source: Path, copy: Path, configs: Sequence[str]) -> list[str]:
    found = [] if _same(source, copy) else [str(source)]
    for name in configs:
        mine = config_copy(copy, name)
        if mine.exists() and mine.read_bytes() != Path(name).read_bytes():
            found.append(name)
    return found


def _same(source: Path, copy: Path) -> bool:
    """Whether the packages of both hold the same bytes: notes and tests may differ."""
    return source.resolve() == copy.resolve() or _contents(source) == _contents(copy)


def _contents(folder: Path) -> dict[str, bytes]:
    found = (path for package in PACKAGES for path in (folder / package).rglob("*"))
    kept = [path for path in found if path.suffix in SOURCES and path.is_file() and path.name != "site.env"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def _describe(source: Path, copy: Path) -> None:
    # Bytes: a change may be of a file in another encoding, and must apply as it is.
    commit, difference = _git(source, "rev-parse", "HEAD"), _git(source, "diff", "HEAD", "--binary")
    known = {"git.commit": commit.decode().strip(), "git.dirty": str(bool(_git(source, "status", "--porcelain"))).lower()} if commit else {}
    if difference:
        (copy / DIFF_NAME).write_bytes(difference)
    made = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    names = sorted(str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file())
    record = {"source": str(source.resolve()), "copied": made, **known, "files": names}
    (copy / CODE_RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=True) + "\n")


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Output; None where `folder` is not the top of a checkout, or there is no git."""
    if not (folder / ".git").exists():
        return None
    # In a container the folder may seem to be somebody else's, which git refuses to read.
    command = ["git", "-c", "safe.directory=*", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=GIT_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError):
        return None
