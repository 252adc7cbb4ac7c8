"""A folder with every wheel that an installation takes, for machines without internet: making it, and checking it before use."""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pip._vendor.packaging.tags import sys_tags
from pip._vendor.packaging.utils import parse_wheel_filename

from tools.packages import ROOT, build_requirements, pins, project_digest, requirements
from tools.pip_calls import Pip, errors

MANIFEST = "manifest.json"
FORMAT = 1


class Unusable(Exception):
    """The folder cannot be used; the message says why and what to do."""


def main(args: list[str] | None = None) -> int:
    """Exit status 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="make wheelhouse", description=__doc__)
    parser.add_argument("action", choices=("make", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch-index", default="", help="package index that torch may come from, beside the default one")
    options = parser.parse_args(args)
    # In order with stderr, in a log too.
    sys.stdout.reconfigure(line_buffering=True)
    try:
        if options.action == "make":
            make(options.folder, options.torch_index)
        else:
            check(options.folder, needs_torch=True)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def make(folder: Path, torch_index: str = "") -> None:
    """Everything for `make install` and `make test` with this Python on this platform. Raises Unusable."""
    started = time.monotonic()
    extra = ["--extra-index-url", torch_index] if torch_index else []
    with replacing(folder) as partial, tempfile.TemporaryDirectory() as scratch:
        # pip of a fresh environment: this Python's own may be old, altered by its distributor, or missing.
        subprocess.run([sys.executable, "-m", "venv", scratch], check=True)
        wanted = [f"torch=={pins()['torch']}", *(str(one) for one in requirements("test").values()), *build_requirements()]
        print(f"collecting wheels in {folder}")
        reused = ["--find-links", str(folder.absolute())] if folder.is_dir() else []
        result = Pip(str(Path(scratch) / "bin" / "python")).run(
            "wheel", "--wheel-dir", str(partial), "-c", str(ROOT / "constraints.txt"), *extra, *reused, *wanted, progress=True
        )
        if result.returncode:
            raise Unusable("pip could not collect everything:\n  " + "\n  ".join(errors(result.stdout)))
        finish(partial, beside={}, shown=folder)
    print(f"made in {time.monotonic() - started:.0f} s; copy the folder, and there: make install OFFLINE={folder}")


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` once the block is through. Raises Unusable where that would destroy something."""
    folder = folder.absolute()
    if os.path.lexists(folder) and not _is_wheelhouse(folder):
        raise Unusable(f"{folder} exists and is no wheelhouse: name another folder with WHEELHOUSE=DIR")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of a name that nothing else has.
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise Unusable(f"{folder}: {error.strerror}: name another folder with WHEELHOUSE=DIR") from error
    try:
        partial = scratch / "new"
        partial.mkdir()
        yield partial
        if folder.exists():
            os.rename(folder, scratch / "old")
        os.rename(partial, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_wheelhouse(folder: Path) -> bool:
    """Whether it holds nothing but what `make` wrote; an empty folder is one as well."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    if not names:
        return True
    try:
        return names <= {MANIFEST, *_read(folder)["files"]}
    except (Unusable, KeyError, TypeError):
        return False


def finish(partial: Path, beside: dict[str, str], shown: Path) -> None:
    """Write the manifest. beside: versions of the environment's own packages, where the wheels are for an environment that has them."""
    wheels = sorted(partial.glob("*.whl"))
    files = {wheel.name: {"bytes": wheel.stat().st_size, "sha256": _sha256(wheel)} for wheel in wheels}
    manifest = {
        "format": FORMAT, "project": project_digest(), "python": _python(), "platform": sysconfig.get_platform(), "beside": beside,
        "files": files,
    }  # fmt: skip
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    size = sum(entry["bytes"] for entry in files.values())
    print(f"{shown}: {len(files)} wheels, {size / 1e6:.0f} MB, for Python {_python()} on {sysconfig.get_platform()}")


def check(folder: Path, needs_torch: bool) -> None:
    """Compare the folder with its manifest and with this machine. Raises Unusable."""
    manifest = _read(folder)
    if manifest["python"] != _python():
        raise Unusable(
            f"{folder} was made for Python {manifest['python']}, this is Python {_python()}: make one with this Python "
            f"(`make wheelhouse PYTHON=...`), or install with PYTHON=/path/to/python{manifest['python']}"
        )
    if manifest["platform"] != sysconfig.get_platform():
        raise Unusable(f"{folder} was made on {manifest['platform']}, this is {sysconfig.get_platform()}: make one on a machine like this")
    if manifest["project"] != project_digest():
        raise Unusable(f"{folder} was made for another version of this project: make it again with `make wheelhouse` from these sources")
    if needs_torch and manifest["beside"]:
        raise Unusable(
            f"{folder} was made with FOR=current, for an environment that has torch {manifest['beside'].get('torch')} itself: use "
            f"`make install-into-current OFFLINE={folder}`, or make one without FOR=current"
        )
    files = manifest["files"]
    print(f"checking {len(files)} wheels in {folder}")
    wrong = [
        f"{name} is {'cut or changed' if (folder / name).is_file() else 'missing'}"
        for name, entry in files.items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["bytes"] or _sha256(folder / name) != entry["sha256"]
    ]
    if wrong:
        raise Unusable(f"{folder}: {', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''}: copy the whole folder again")
    here = set(sys_tags())
    unfit = [name for name in files if not parse_wheel_filename(name)[3] & here]
    if unfit:
        raise Unusable(
            f"{folder}: {', '.join(unfit[:5])} cannot be used on this machine (an older C library?): make the folder on one like it"
        )


def _read(folder: Path) -> dict:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise Unusable(f"{path} has format {manifest['format']}, {FORMAT} is known: make the folder again with `make wheelhouse`")
        return manifest
    except OSError as error:
        raise Unusable(
            f"{path}: {error.strerror}: OFFLINE names a folder made by `make wheelhouse` where there is internet, copied whole"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{path} is damaged: copy the whole folder again") from error


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
