"""Which checkpoints there are: written beside, published by rename, the newest complete one found again, old ones removed.

    OUTPUT_DIR/checkpoints/step_00001200/
        state/          tensors and step counts (megatron_qsparse.parallel.checkpoint)
        trainer.json    where training stands
        config.yaml     the resolved configuration
        files.json      size and sha256 of every file above; written last

A directory without a correct files.json, or with a file of another size or checksum than it says, is not a checkpoint: it is
skipped with a warning and the one before is used.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

FORMAT_VERSION = 1
FILES_NAME = "files.json"
_PREFIX, _PARTIAL = "step_", ".partial"


class CheckpointDirectory:
    """The checkpoints of one run. warn: receives a sentence for everything unusual."""

    def __init__(self, path: Path, keep_last: int, warn: Callable[[str], None] = lambda text: print(f"warning: {text}", file=sys.stderr)):
        self.path, self.keep_last, self.warn = path, keep_last, warn

    def begin(self, step: int) -> Path:
        """A new empty directory to write into; what interrupted saves left, at this step or another, is removed."""
        partial = self.path / f"{_PREFIX}{step:08d}{_PARTIAL}"
        for left in self.path.glob(f"{_PREFIX}*{_PARTIAL}"):
            shutil.rmtree(left)
        (partial / "state").mkdir(parents=True)
        return partial

    def publish(self, partial: Path) -> Path:
        """Seal a written directory and give it its name; then remove the oldest beyond `keep_last`. Returns the new path."""
        listing = {str(p.relative_to(partial)): _describe(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        _write_durably(partial / FILES_NAME, json.dumps({"format_version": FORMAT_VERSION, "files": listing}, indent=1))
        for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
            _sync(folder)
        final = partial.with_name(partial.name.removesuffix(_PARTIAL))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(self.path)
        for old in self.complete()[: -self.keep_last]:
            shutil.rmtree(old)
        return final

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [path for path in self._published() if damage(path) is None]

    def newest(self) -> Path | None:
        """The newest complete checkpoint; warns of newer ones that are damaged. None where none was ever published.

        Raises ValueError where there are checkpoints and all are damaged: starting over would overwrite them.
        """
        published = self._published()
        for path in reversed(published):
            problem = damage(path, contents=True)
            if problem is None:
                return path
            self.warn(f"{path} is not a complete checkpoint ({problem}); looking for the one before it")
        if published:
            raise ValueError(f"every checkpoint in {self.path} is damaged: restore one, or move the directory away to start over")
        return None

    def _published(self) -> list[Path]:
        if not self.path.is_dir():
            return []
        return sorted(p for p in self.path.iterdir() if p.name.startswith(_PREFIX) and p.name.removeprefix(_PREFIX).isdigit())


def step_of(path: Path) -> int:
    """Optimizer steps taken when this checkpoint was saved."""
    return int(path.name.removeprefix(_PREFIX))


def damage(path: Path, contents: bool = False) -> str | None:
    """Why this directory is not a complete checkpoint; None where it is one. contents: compare checksums, not only sizes."""
    try:
        listing = json.loads((path / FILES_NAME).read_text())["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listing.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{FILES_NAME}: {error}"
    for name, (expected_size, expected_sha256) in expected.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != expected_size:
            return f"{name} has {size} bytes instead of {expected_size}"
        if contents and _sha256(path / name) != expected_sha256:
            return f"{name} has other contents than when it was written"
    return None


def _describe(path: Path) -> dict:
    _sync(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
