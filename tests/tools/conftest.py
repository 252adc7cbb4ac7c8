from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.miniature import Miniature, copy_of_pip


@pytest.fixture(scope="session")
def pip(tmp_path_factory) -> Path:
    return copy_of_pip(tmp_path_factory.mktemp("pip"))


@pytest.fixture
def miniature(tmp_path, pip) -> Callable[..., Miniature]:
    """An environment that has a torch 2.9 as containers name it and a numpy 1.26, unless other packages are given."""

    def make(**packages: str) -> Miniature:
        small = Miniature(tmp_path / "miniature", pip)
        for name, version in (packages or {"torch": "2.9.0a0+site", "numpy": "1.26.4"}).items():
            small.has(name.replace("_", "-"), version)
        return small

    return make
