"""Megatron's groups in the test process itself, for layers that need no second rank."""

from collections.abc import Iterator

import pytest

from tests.parallel.helpers import one_process


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A world of one rank."""
    with one_process():
        yield
