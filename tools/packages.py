"""What this project needs, what is installed, and what of that belongs to the machine. Standard library and pip only."""

import configparser
import fnmatch
import hashlib
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "megatron-qsparse"

PROTECTED = {
    "torch": "the build for this machine's driver and network; all compiled packages below are linked against it",
    "torchvision": "compiled against this torch",
    "torchaudio": "compiled against this torch",
    "torch-tensorrt": "compiled against this torch",
    "triton": "its version belongs to torch's",
    "pytorch-triton*": "triton under another name",
    "triton-rocm": "triton under another name",
    "triton-xpu": "triton under another name",
    "transformer-engine*": "compiled against this torch and CUDA",
    "flash-attn*": "compiled against this torch and CUDA",
    "xformers": "compiled against this torch and CUDA",
    "apex": "compiled against this torch and CUDA",
    "mamba-ssm": "compiled against this torch and CUDA",
    "causal-conv1d": "compiled against this torch and CUDA",
    "grouped-gemm": "compiled against this torch and CUDA",
    "numpy": "the binary interface of everything compiled against it",
    "nvidia-*": "the CUDA libraries that torch loads",
    "cuda-*": "the CUDA libraries that torch loads",
    "cupy*": "compiled against this CUDA",
}
"""Packages by name pattern that an installation into somebody's environment leaves alone, and why."""

OTHER_NAMES = {"triton": ("pytorch-triton*", "triton-rocm", "triton-xpu")}
"""Packages that bring the files of another one: that one is there with them, and would write over them."""

STACKS = ("megatron-core", "deepspeed")
"""What other training code of an environment is built on: replaced in nobody's environment."""


def canonical(name: str) -> str:
    """A package's name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_protected(name: str) -> bool:
    return any(fnmatch.fnmatchcase(canonical(name), pattern) for pattern in PROTECTED)


def present_otherwise(before: Iterable[str]) -> set[str]:
    """Packages that an environment with these names has under another one."""
    here = {canonical(name) for name in before}
    return {name for name, others in OTHER_NAMES.items() if any(fnmatch.filter(here, pattern) for pattern in others)} - here


def requirements(*extras: str) -> dict[str, Requirement]:
    """Of setup.cfg, with these extras: the ones that hold for this Python, by name."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    for extra in extras:
        lines += config["options.extras_require"][extra].splitlines()
    return {canonical(one.name): one for one in _applicable(lines)}


def build_requirements() -> list[str]:
    """What building the project itself takes."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]


def pins() -> dict[str, str]:
    """Tested version of each package of constraints.txt, for this Python."""
    return {
        canonical(one.name): next(iter(one.specifier)).version for one in _applicable((ROOT / "constraints.txt").read_text().splitlines())
    }


def _applicable(lines: Iterable[str]) -> list[Requirement]:
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return [one for one in parsed if one.marker is None or one.marker.evaluate()]


def project_digest() -> str:
    """SHA-256 of everything that decides which packages are installed."""
    files = [ROOT / name for name in ("setup.cfg", "constraints.txt", "pyproject.toml")]
    parts = [files[0].read_text().split("[options]", 1)[1], *(path.read_text() for path in files[1:])]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Installed:
    """One package of an environment. fingerprint: changes with its version and with any of its files' size or time of writing."""

    version: str
    location: Path
    fingerprint: str | None = None

    @property
    def inside(self) -> bool:
        """False where it lies outside the active environment: a virtual environment that sees the system's packages."""
        return self.location.is_relative_to(Path(sys.prefix).resolve())


def installed(path: list[str] | None = None) -> dict[str, Installed]:
    """What Python imports from `path` (default: sys.path), by name; protected packages with a fingerprint."""
    found: dict[str, Installed] = {}
    for dist in importlib.metadata.distributions(**({} if path is None else {"path": path})):
        name = canonical(dist.metadata["Name"] or "")
        if name and name not in found:
            location = Path(dist.locate_file("")).resolve()
            found[name] = Installed(dist.version, location, _fingerprint(dist) if is_protected(name) else None)
    return found


def _fingerprint(dist: importlib.metadata.Distribution) -> str:
    # As it is written: parsed, a description of several lines may not be put together again (cuda-bindings 13).
    metadata = dist.read_text("METADATA") or dist.read_text("PKG-INFO") or ""
    digest = hashlib.sha256(f"{dist.version}\0{metadata}".encode(errors="replace"))
    for file in sorted(dist.files or [], key=str):
        # Bytecode is written by whoever imports first.
        if file.suffix != ".pyc":
            try:
                status = file.locate().stat()
            except OSError:
                continue
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def changes(before: dict[str, Installed], after: dict[str, Installed]) -> list[str]:
    """What happened to the protected packages of `before`, in words; empty where nothing did."""
    found = []
    for name, old in before.items():
        if is_protected(name):
            new = after.get(name)
            if new is None:
                found.append(f"{name} {old.version} is gone")
            elif new.version != old.version or new.location != old.location:
                found.append(f"{name} was {old.version} in {old.location}, is {new.version} in {new.location}")
            elif new.fingerprint != old.fingerprint:
                found.append(f"{name} {old.version}: its files were changed")
    return found


def parse_version(text: str) -> Version | None:
    """None where it is not a version by PEP 440, as of some builds by hand."""
    try:
        return Version(text)
    except InvalidVersion:
        return None
