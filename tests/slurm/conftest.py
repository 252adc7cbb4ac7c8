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


_WENT_ON, _RAN = pytest.StashKey[list[str]](), pytest.StashKey[dict[str, list]]()


def pytest_configure(config) -> None:
    config.stash[_WENT_ON], config.stash[_RAN] = [], {}


def pytest_runtest_makereport(item, call) -> None:
    """Adds up the seconds of a test's parts."""
    if item.nodeid.startswith("tests/slurm/"):
        entry = item.config.stash[_RAN].setdefault(item.nodeid.split("/")[-1], [0.0, "passed"])
        entry[0] += call.duration
        if call.excinfo:
            entry[1] = "skipped" if call.excinfo.errisinstance(pytest.skip.Exception) else "failed"


def pytest_sessionfinish(session) -> None:
    """What `--slurm-log FILE` asks for."""
    if path := session.config.getoption("--slurm-log"):
        lines = ["| what happened | from the signal to the queue, s | from the queue to the end of the next step, s | went on after step |"]
        lines += ["|---" * 4 + "|", *session.config.stash[_WENT_ON], "", "| test | s | |", "|---|---|---|"]
        lines += [f"| {name} | {seconds:.1f} | {outcome} |" for name, (seconds, outcome) in session.config.stash[_RAN].items()]
        Path(path).write_text("\n".join([*lines, ""]))


@pytest.fixture
def slurm_log(pytestconfig):
    """Notes how long a job took to go on."""

    def note(what: str, job: Job, went_on_after: int) -> None:
        queue = f"{job.seconds_to_requeue():.1f}" if "signal" in job.times else ""
        row = (what, queue, f"{job.seconds_to_step(went_on_after + 1):.1f}", went_on_after)
        pytestconfig.stash[_WENT_ON].append("| " + " | ".join(map(str, row)) + " |")

    return note
