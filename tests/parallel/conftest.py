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
