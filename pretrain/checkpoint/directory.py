"""Which checkpoints there are: written beside, published by rename, the newest complete one found again, old ones removed.

A directory without a correct files.json, or with a file of another size or checksum than it says, is not a checkpoint: it is
skipped with a warning and the one before is used.
"""

import contextlib
import secrets
import shutil
import sys
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Literal

from data_tools.files import make_directories, sync
from pretrain.checkpoint.files import Record, damage, seal

Kind = Literal["step", "milestone"]
KINDS: tuple[Kind, ...] = ("step", "milestone")
DIGITS = 8
"""Of the step in a name, at least."""
PARTIAL = ".partial"
REMOVED = ".removed"
"""Behind the name of one that is being removed, or of what could not be removed."""
GIVEN_UP = ".given-up"
"""Before that, of one that nobody is to find again."""
STATE_NAME = "state"
"""Folder of the tensors in a checkpoint."""


class CheckpointDirectory:
    """The checkpoints of one run. warn: receives a sentence for everything unusual.

    owner: part of the names of what is being written: a process that has lost the run without knowing must not write into its
    successor's files.
    reach: in steps; one checkpoint at least as far back is kept besides the last `keep_last`, 0 for none. Those that signals ask for
    lie closer together than the interval says.
    """

    def __init__(
        self, path: Path, keep_last: int, warn: Callable[[str], None] = lambda text: print(f"warning: {text}", file=sys.stderr),
        reach: int = 0, owner: str = "",
    ):  # fmt: skip
        self.path, self.keep_last, self.warn, self.reach, self.owner = path, keep_last, warn, reach, owner

    def partial(self, step: int, kind: Kind = "step") -> Path:
        """Where the checkpoint of a step is written before it is published."""
        return self.path / f"{kind}_{step:0{DIGITS}d}{'.' if self.owner else ''}{self.owner}{PARTIAL}"

    def begin(self, step: int, kind: Kind = "step") -> Path:
        """A new empty directory to write into; what interrupted saves left of it, and of other steps, is removed.

        Raises OSError where it cannot be made; others' leftovers that cannot be removed are only warned of.
        """
        partial = self.partial(step, kind)
        if partial.exists():
            shutil.rmtree(partial)
        for left in self.path.glob(f"*{PARTIAL}"):
            if left.stem.partition("_")[2] == partial.stem.partition("_")[2]:
                # The other kind of the same save.
                continue
            try:
                remove(left)
            except OSError as error:
                self.warn(f"{left}, of an interrupted save, could not be removed: {error}")
        make_directories(partial / STATE_NAME)
        return partial

    def publish(self, partial: Path, written: Mapping[str, Record] | None = None) -> Path:
        """Seal a written directory and give it its name; then remove the oldest steps beyond `keep_last`. Returns the new path.

        written: files in it, by relative name, that are durable already and whose checksums are known. Raises OSError where it
        is not published; what cannot be removed afterwards is only warned of.
        """
        seal(partial, written or {})
        final = partial.with_name(partial.name.partition(".")[0])
        replaced = _set_aside(final) if final.exists() else None
        try:
            partial.rename(final)
        except OSError:
            if replaced is not None:
                replaced.rename(final)
            raise
        sync(self.path)
        self._clean_up(final, replaced)
        return final

    def superfluous(self, keep_last: int, kind: Kind = "step", newest: Path | None = None) -> list[Path]:
        """Checkpoints before the last `keep_last`, of those complete by their files' sizes. Damaged ones are neither counted nor listed.

        newest: later steps are not counted either. A run that went on from an older checkpoint did so because those could not be
        read: what it publishes must not make way for them.
        """
        complete = [path for path in self.complete(kind) if newest is None or step_of(path) <= step_of(newest)]
        last = max(0, len(complete) - keep_last)
        old, kept = complete[:last], complete[last:]
        if self.reach and old:
            far = step_of(complete[-1]) - self.reach
            if step_of(kept[0]) > far:
                # Where none is far enough yet, the oldest will be the first.
                old.remove(max((path for path in old if step_of(path) <= far), key=step_of, default=old[0]))
        return old

    def _clean_up(self, published: Path, replaced: Path | None) -> None:
        """The new checkpoint is there, whatever happens to old ones."""
        try:
            for left in self.path.glob(f"*{REMOVED}"):
                if left != replaced:
                    _restore_or_remove(left)
            # After a milestone too: what was just restored may be one that was being removed when the process died.
            old = self.superfluous(self.keep_last, newest=published)
        except OSError as error:
            self.warn(f"{self.path} could not be looked through for old checkpoints: {error}")
            return
        for path in filter(None, (replaced, *old)):
            try:
                remove(path)
            except OSError as error:
                self.warn(f"{path} could not be removed: {error}")

    def complete(self, kind: Kind = "step") -> list[Path]:
        """Complete checkpoints, oldest first."""
        return [path for path in self.published(kind) if damage(path) is None]

    def newest(
        self, contents: bool = True, without: Container[Path] = (), progress: Callable[[int], None] = lambda nbytes: None
    ) -> Path | None:
        """The newest complete checkpoint; warns of newer ones that are damaged. None where none was ever published.

        contents: complete by every byte, not only by sizes. without: those not looked at. progress: told of bytes read.

        Raises ValueError where there are checkpoints and all are damaged: starting over would overwrite them.
        """
        published = [path for path in self.published() if path not in without]
        for path in reversed(published):
            problem = damage(path, contents, progress)
            if problem is None:
                return path
            self.warn(f"{path} is not a complete checkpoint ({problem}); looking for the one before it")
        if published:
            raise ValueError(f"every checkpoint in {self.path} is damaged: restore one, or move the directory away to start over")
        return None

    def published(self, kind: Kind = "step") -> list[Path]:
        """Directories with the name of a checkpoint, complete or damaged, oldest first."""
        if not self.path.is_dir():
            return []
        return sorted(p for p in self.path.iterdir() if p.is_dir() and kind_of(p) == kind)


def remove(checkpoint: Path, for_good: bool = False) -> None:
    """Take a checkpoint away; one that is removed half-way is no damaged checkpoint. One that is gone already is no error.

    for_good: it is not restored either where that is broken off while it is whole.
    """
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(checkpoint if checkpoint.name.endswith(REMOVED) else _set_aside(checkpoint, GIVEN_UP if for_good else ""))


def _restore_or_remove(left: Path) -> None:
    """What was set aside and is still there: whole and without a successor where a process died before it published that."""
    original = left.with_name(left.name.removesuffix(REMOVED).rpartition(".")[0])
    if kind_of(original) and not original.exists() and damage(left) is None:
        left.rename(original)
    else:
        # That it could not be removed was told then; or another process is at it now.
        shutil.rmtree(left, ignore_errors=True)


def _set_aside(checkpoint: Path, mark: str = "") -> Path:
    """Its new path: no checkpoint's name, and one that nothing left there has."""
    return checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}{mark}.{secrets.token_hex(4)}{REMOVED}"))


def kind_of(path: Path) -> Kind | None:
    """What a published checkpoint is by its name; None where it is none."""
    kind, _, number = path.name.partition("_")
    return next((known for known in KINDS if known == kind and number.isdecimal() and len(number) >= DIGITS), None)


def is_one(path: Path) -> bool:
    """Whether a path that somebody names is a checkpoint; not a run directory that is called like one."""
    return kind_of(path) is not None and path.is_dir() and not (path / "checkpoints").exists()


def step_of(path: Path) -> int:
    """Optimizer steps taken when this checkpoint was saved."""
    return int(path.name.partition("_")[2])
