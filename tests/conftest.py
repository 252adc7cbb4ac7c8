"""Options, and the processes that all tests of this session share."""

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from data_tools.cli import main as data_tools
from pretrain.tracking.store import connect
from tests.distributed import Pool
from tests.pretrain.finished import Finished, start, uri
from tests.pretrain.launch import TIMEOUT_S

# The machine may be busy: no test is about how long an example takes.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_addoption(parser):
    parser.addoption("--invariance-table", metavar="FILE", help="write what tests/parallel/test_invariance.py measured, as markdown")
    parser.addoption("--slurm-log", metavar="FILE", help="write how long the jobs and tests of tests/slurm took, as markdown")
    parser.addoption("--kill-log", metavar="FILE", help="write what tests/pretrain/test_killed.py went through, as markdown")


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four processes."""
    with Pool(4) as processes:
        yield processes


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """Real shards: pieces of the standard library, a vocabulary of 512, about 8,000 training tokens. Many small documents, so
    that the split, which a hash of each text decides, gives about as many tokens with another Python."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text[:340]}) + "\n" for text in texts))
    tokenizer, shards = folder / "tokenizer", folder / "shards"
    assert data_tools(["train-tokenizer", "--input", str(corpus), "--vocab-size", "512", "--output", str(tokenizer)]) == 0
    command = ["tokenize", "--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(shards)]
    assert data_tools([*command, "--validation-fraction", "0.3", "--workers", "1"]) == 0
    return shards


@pytest.fixture(scope="session")
def database(tmp_path_factory) -> Path:
    """MLflow's, with its tables: making them takes longer than training."""
    folder = tmp_path_factory.mktemp("database")
    connect(uri(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="session")
def unbroken(shards, database, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copy(database, folder)
    with start(folder, shards) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, output
    return Finished.read(folder)
