"""The runs that several files compare, and the invariance suite's table."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.parallel.report import InvarianceTable
from tests.parallel.training import Case, History, train_all, train_plainly

VARIANTS = ("dense", "bitnet_groups_subln", "tied_bitnet_subln")
ONE = [Case(variant, precision) for variant in VARIANTS for precision in ("fp32", "bf16")]
RECOMPUTE = [replace(case, recompute=True) for case in ONE[2:4]]
PIPELINE = [replace(case, pipeline=2) for case in ONE[2:]]
PIPELINE_STAGE_2 = Case("dense", "fp32", pipeline=2, stage=2)
PIPELINE_RECOMPUTE = [replace(case, pipeline=2) for case in RECOMPUTE] + [replace(PIPELINE_STAGE_2, recompute=True)]
TWO_COPIES = Case("tied_bitnet_subln", "bf16", two_copies=True)


@pytest.fixture(scope="package", autouse=True)
def _quiet_afterwards(pool) -> Iterator[None]:
    """Idle processes with many process groups slow down the tests that follow."""
    yield
    pool.rest()


@pytest.fixture(scope="session")
def plain(pool) -> dict[Case, History]:
    """By torch.optim.AdamW in one process."""
    return pool.run(train_plainly, 1, [*ONE, TWO_COPIES])[0]


@pytest.fixture(scope="session")
def one_rank(pool) -> dict[Case, History]:
    """By the engine in one process."""
    return pool.run(train_all, 1, ONE + RECOMPUTE)[0]


@pytest.fixture(scope="session")
def two_stages(pool) -> dict[Case, History]:
    """By the engine on two pipeline stages."""
    return pool.run(train_all, 2, [*PIPELINE, PIPELINE_STAGE_2, *PIPELINE_RECOMPUTE])[0]


@pytest.fixture(scope="session")
def invariance_table(pytestconfig) -> Iterator[InvarianceTable]:
    """Written at the end where `--invariance-table FILE` asks for it."""
    table, path = InvarianceTable(), pytestconfig.getoption("--invariance-table")
    yield table
    if path:
        table.write(Path(path))
