"""QSPARSE_CONTAINER: everything of a job that needs Python runs with the options of the container plugin."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster as module
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import flags, submit


@pytest.fixture
def with_plugin(tmp_path) -> Iterator[Cluster]:
    if reason := module.missing():
        pytest.skip(reason)
    if not shutil.which("gcc") or not Path("/usr/include/slurm/spank.h").exists():
        pytest.skip("compiling the plugin needs gcc and slurm/spank.h (Debian's libslurm-dev)")
    plugin = tmp_path / "pyxis.so"
    source = Path(__file__).with_name("pyxis.c")
    subprocess.run(["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", plugin, source], check=True)
    with Cluster(nodes=2, plugin=plugin) as found:
        yield found


@pytest.mark.slurm
def test_a_run_in_a_container(with_plugin, shards, tmp_path):
    linked = tmp_path / "linked"
    (tmp_path / "disk").mkdir()
    linked.symlink_to(tmp_path / "disk")
    env = {"QSPARSE_CONTAINER": "registry#some/image:1", "QSPARSE_MOUNTS": "/etc:/mnt", "QSPARSE_RUNS": str(linked)}
    job = submit(with_plugin, tmp_path, *flags(tmp_path, shards, "--tracking.enabled", "false"), env=env)
    assert "finished: all 12 steps are done" in job.finish()
    environment = (job.run / "slurm" / f"{job.id}.0" / "environment.txt").read_text().splitlines()
    assert "CONTAINER_IMAGE=registry#some/image:1" in environment and f"CONTAINER_WORKDIR={tmp_path}" in environment
    (mounts,) = (line for line in environment if line.startswith("CONTAINER_MOUNTS="))
    assert f"{tmp_path}:{tmp_path}" in mounts and mounts.endswith(",/etc:/mnt")
    # What the flags alone name; a home that is a link is called by both of its names.
    assert f"{shards}:{shards}," in mounts and f"{linked}:{linked},{tmp_path / 'disk'}:{tmp_path / 'disk'}," in mounts
