import shutil
from pathlib import Path

import pytest

from pretrain.tracking.store import connect
from tests.pretrain.finished import Finished, start, uri
from tests.pretrain.launch import TIMEOUT_S


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
