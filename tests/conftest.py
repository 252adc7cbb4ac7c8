"""Options, and the processes that all tests of this session share."""

from collections.abc import Iterator

import pytest

from tests.distributed import Pool


def pytest_addoption(parser):
    parser.addoption("--invariance-table", metavar="FILE", help="write what tests/parallel/test_invariance.py measured, as markdown")
    parser.addoption("--kill-log", metavar="FILE", help="write what tests/pretrain/test_killed.py went through, as markdown")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes."""
    with Pool(4) as processes:
        yield processes
