"""The cluster, and runs on it."""

from collections.abc import Iterator

import pytest

from tests.slurm import cluster as module
from tests.slurm.cluster import Cluster


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
