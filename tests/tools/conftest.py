from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.miniature import Miniature, make_template


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    return make_template(tmp_path_factory.mktemp("template") / "venv")


@pytest.fixture
def miniature(tmp_path, template) -> Callable[..., Miniature]:
    """An environment that has a torch 2.9 as containers name it and a numpy 1.26, unless other packages are given."""

    def make(**packages: str) -> Miniature:
        small = Miniature(tmp_path / "miniature", template)
        for name, version in (packages or {"torch": "2.9.0a0+site", "numpy": "1.26.4"}).items():
            small.has(name.replace("_", "-"), version)
        return small

    return make
