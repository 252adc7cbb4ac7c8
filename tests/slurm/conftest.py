"""The cluster, and runs on it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster as module
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job


@pytest.fixture(scope="session")
def _cluster() -> Iterator[Cluster]:
    if reason := module.missing():
        pytest.skip(reason)
    with Cluster(nodes=3) as found:
        yield found


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """Three nodes, all of them ready."""
    _cluster.resume()
    return _cluster


@pytest.fixture(scope="session")
def _rows(pytestconfig) -> Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    if path := pytestconfig.getoption("--slurm-log"):
        head = ["| what happened | from the signal to the queue, s | from the queue to the end of the next step, s | went on after step |"]
        Path(path).write_text("\n".join([*head, "|---" * 4 + "|", *rows, ""]))


@pytest.fixture
def slurm_log(_rows):
    """Notes how long a job took to go on; written at the end where `--slurm-log FILE` asks for it."""

    def note(what: str, job: Job, went_on_after: int) -> None:
        queue = f"{job.seconds_to_requeue():.1f}" if "signal" in job.times else ""
        row = (what, queue, f"{job.seconds_to_step(went_on_after + 1):.1f}", went_on_after)
        _rows.append("| " + " | ".join(map(str, row)) + " |")

    return note
