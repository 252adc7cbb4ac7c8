"""What another process does between two looks of ours at a folder."""

from collections.abc import Callable
from pathlib import Path

import pytest


def overtake(monkeypatch: pytest.MonkeyPatch, path: Path, act: Callable[[], object]) -> None:
    """The first time that `path.is_dir()` is asked, `act` takes place right behind the answer."""
    look = Path.is_dir

    def is_dir(asked: Path) -> bool:
        found = look(asked)
        if asked == path:
            monkeypatch.setattr(Path, "is_dir", look)
            act()
        return found

    monkeypatch.setattr(Path, "is_dir", is_dir)
