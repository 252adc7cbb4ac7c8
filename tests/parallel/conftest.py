"""The runs that several files compare, each pool of processes started once."""

from dataclasses import replace

import pytest

from tests.distributed import run_distributed
from tests.parallel.training import Case, History, train_all, train_plainly

VARIANTS = ("dense", "bitnet_groups_subln", "tied_bitnet_subln")
ONE = [Case(variant, precision) for variant in VARIANTS for precision in ("fp32", "bf16")]
DATA_PARALLEL = [replace(case, stage=stage) for case in ONE[:4] for stage in (1, 2)]
PIPELINE = [replace(case, pipeline=2) for case in ONE]
PIPELINE_STAGE_2 = [replace(case, pipeline=2, stage=2) for case in ONE[:2]]
RECOMPUTE = [replace(case, recompute=True) for case in ONE[2:4]]
PIPELINE_RECOMPUTE = [replace(case, pipeline=2) for case in RECOMPUTE] + [replace(PIPELINE_STAGE_2[0], recompute=True)]
TENSOR = [Case("bitnet_groups_subln", tensor=2, steps=1)] + [Case(variant, tensor=2, sequence=True, steps=1) for variant in VARIANTS]
TWO_COPIES = Case("tied_bitnet_subln", "bf16", two_copies=True)
UNRESET = [Case(precision="fp32", pipeline=2, stage=2, steps=1, without_reset=True),
           Case(precision="bf16", pipeline=2, stage=1, steps=1, without_reset=True)]  # fmt: skip
ZERO_3 = [
    Case("bitnet_groups_subln", tensor=2, sequence=True, stage=3, steps=2),
    Case("tied_bitnet_subln", "bf16", tensor=2, stage=3, steps=2),
]


@pytest.fixture(scope="session")
def plain() -> dict[Case, History]:
    """By torch.optim.AdamW in one process."""
    return run_distributed(train_plainly, 1, [*ONE, TWO_COPIES])[0]


@pytest.fixture(scope="session")
def one_rank() -> dict[Case, History]:
    """By the engine in one process."""
    return run_distributed(train_all, 1, ONE + RECOMPUTE)[0]


@pytest.fixture(scope="session")
def two_ranks() -> dict[Case, History]:
    """By the engine on two ranks: data, pipeline or tensor parallel."""
    cases = DATA_PARALLEL + PIPELINE + PIPELINE_STAGE_2 + PIPELINE_RECOMPUTE + TENSOR + UNRESET
    return run_distributed(train_all, 2, cases, timeout=300)[0]


def _on_four_ranks(rank: int) -> dict:
    from tests.parallel.test_grouped_query import compare

    return {**train_all(rank, ZERO_3 + [replace(case, stage=1) for case in ZERO_3]), "grouped query": compare()}


@pytest.fixture(scope="session")
def four_ranks() -> dict:
    """By the engine on two by two tensor- and data-parallel ranks; and what `test_grouped_query` compares on four."""
    return run_distributed(_on_four_ranks, 4, timeout=300)[0]
