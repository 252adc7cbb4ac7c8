"""Submission: what DRY_RUN=1 shows, and whether a cluster of 32 nodes with 8 GPUs each would take the scripts as they are."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster as module
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import SCRIPTS, environment

TRAINING = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name.startswith(("pretrain_", "sweep_")))
TOOLS = ("acceptance.sh", "compare.sh", "mlflow_server.sh", "preflight.sh")
ALL = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "lib.sh")


@pytest.fixture(scope="module")
def large() -> Iterator[Cluster]:
    if reason := module.missing():
        pytest.skip(reason)
    with Cluster(nodes=32, cpus=96, gpus=8, memory_mb=2_000_000) as found:
        yield found


def test_there_are_the_scripts_that_are_promised():
    names = {f"pretrain_7b_{name}.sh" for name in ("qsparse", "dense", "bitnet", "bitnet_qsparse")}
    assert names | {"pretrain_moe.sh", "sweep_sparsity.sh", "compare.sh", "mlflow_server.sh"} <= set(ALL)


@pytest.mark.parametrize(("script", "nodes"), [*((script, None) for script in ALL), *((script, 32) for script in TRAINING)])
def test_a_large_cluster_would_take_it(script, nodes, large, tmp_path):
    options = [f"--nodes={nodes}"] if nodes else []
    said = large.client("sbatch", "--test-only", *options, SCRIPTS / script, cwd=tmp_path)
    assert "to start at" in said
    if nodes:
        assert "using 3072 processors on nodes node[1-32]" in said


def test_a_cluster_that_cannot_take_it_says_so(large, tmp_path):
    said = large.client("sbatch", "--test-only", "--nodes=33", SCRIPTS / TRAINING[0], cwd=tmp_path, check=False)
    assert "Requested node configuration is not available" in said


@pytest.mark.parametrize("nodes", [8, 32])
def test_dry_run_of_the_7b_plan(nodes, large, shards, tmp_path):
    env = {"DRY_RUN": "1", "QSPARSE_SBATCH": f"--nodes={nodes} --time=12:00:00", "QSPARSE_DATA": str(shards)}
    env |= {"QSPARSE_SETUP": environment(tmp_path)["QSPARSE_SETUP"], "QSPARSE_RUNS": str(tmp_path / "runs")}
    script = SCRIPTS / "pretrain_7b_qsparse.sh"
    # Data for a test hold no batch of a 7B model.
    small = ["--train.global_batch_size", 256, "--data.sequence_length", 8, "--validation.samples", 256]
    said = large.client("bash", script, *small, "--optimizer.lr", "1e-4", cwd=tmp_path, env=env)
    assert f"would run: sbatch --nodes={nodes} --time=12:00:00 {script}" in said and "--optimizer.lr 1e-4" in said
    assert "goes on by CONTINUE=requeue (this cluster has JobRequeue=1)" in said
    assert f"the plan, {nodes} nodes of 8 processes" in said and f"{8 * nodes} = tensor" in said
    assert f"on nodes node[1-{nodes}]" in said and "no problems found" in said
    assert large.client("squeue", "-h").strip() == "" and not (tmp_path / "runs").exists()


def test_dry_run_of_a_node_too_many(large, shards, tmp_path):
    """As the job will: with as many nodes as divide the batch."""
    env = {"DRY_RUN": "1", "QSPARSE_SBATCH": "--nodes=2-3", "QSPARSE_DATA": str(shards), "CONTINUE": "array"}
    env |= {"QSPARSE_SETUP": environment(tmp_path)["QSPARSE_SETUP"], "QSPARSE_RUNS": str(tmp_path / "runs")}
    small = ["--train.global_batch_size", 256, "--data.sequence_length", 8, "--validation.samples", 256]
    said = large.client("bash", SCRIPTS / "pretrain_7b_qsparse.sh", *small, cwd=tmp_path, env=env)
    assert "2 of 3 nodes train, 8 data-parallel ranks" in said and "16 = tensor" in said and "no problems found" in said
    assert "CONTINUE=array (as set, for jobs submitted with --array=1-20%1)" in said


@pytest.mark.parametrize("script", TOOLS)
def test_dry_run_of_what_does_not_train(script, large, tmp_path):
    env = {"DRY_RUN": "1", "QSPARSE_RUNS": str(tmp_path / "runs"), "QSPARSE_SBATCH": "--time=10"}
    said = large.client("bash", SCRIPTS / script, "--flag", "value", cwd=tmp_path, env=env)
    assert f"would run: sbatch --time=10 {SCRIPTS / script} --flag value\n" in said
    assert f"\n  QSPARSE_RUNS={tmp_path}/runs\n" in said
    assert "to start at" in said and large.client("squeue", "-h").strip() == "" and not (tmp_path / "runs").exists()


def test_dry_run_of_what_cannot_start_shows_all_and_fails(large, tmp_path):
    env = {"DRY_RUN": "1", "QSPARSE_SETUP": environment(tmp_path)["QSPARSE_SETUP"], "QSPARSE_DATA": str(tmp_path / "nowhere")}
    done = subprocess.run(
        [*large._before, "bash", SCRIPTS / "pretrain_7b_dense.sh"],
        env=large.environment | env,
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2 and "problem: data.path" in done.stdout and "to start at" in done.stderr


def test_the_way_to_go_on_is_chosen_from_the_cluster(tmp_path):
    if reason := module.missing():
        pytest.skip(reason)
    with Cluster(nodes=1, settings="JobRequeue=0") as cluster:
        said = cluster.client("bash", "-c", f"source {SCRIPTS}/lib.sh; continue_by; echo $CONTINUE_BY: $(continue_why)", cwd=tmp_path)
    assert said.strip() == "singleton: this cluster has JobRequeue=0"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LAUNCHER", "mpirun"), ("PREFLIGHT", "yes"), ("QSPARSE_TRIES", "abc"), ("QSPARSE_PROCESSES_PER_NODE", "0"),
        ("QSPARSE_PREFLIGHT_WAIT", "3min"), ("QSPARSE_PREFLIGHT_FRACTION", "50%"), ("QSPARSE_PREFLIGHT_FRACTION", "0.0"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_told_in_one_line(name, value):
    command = ["bash", "-c", f"source {SCRIPTS}/lib.sh; check_settings; {name}={value}; check_settings"]
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {name}={value} ") and len(done.stderr.splitlines()) == 1


def test_elements_of_a_sweep_are_runs_of_their_own(tmp_path):
    """Whatever the site sets for other jobs."""
    command = f"source {SCRIPTS}/lib.sh; QSPARSE_RUN_PER_ELEMENT=1 continue_by; echo $CONTINUE_BY"
    done = subprocess.run(["bash", "-c", command], env={"PATH": "/usr/bin:/bin", "CONTINUE": "singleton"}, text=True, capture_output=True)
    assert done.stdout.splitlines()[-1] == "requeue" and "CONTINUE=singleton is not for a sweep" in done.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [("", "8 8"), ("--nodes=2-4", "2-4 8"), ("-N 16 --time 1", "16 8"), ("--gpus-per-node h100:4 --nodes 3", "3 h100:4")],
)
def test_what_is_asked_for_is_read_as_sbatch_does(options, expected):
    command = f"JOB_SCRIPT={SCRIPTS}/pretrain_7b_qsparse.sh; source {SCRIPTS}/lib.sh; echo $(requested nodes) $(requested gpus-per-node)"
    env = {"PATH": "/usr/bin:/bin", "QSPARSE_SBATCH": options}
    assert subprocess.run(["bash", "-c", command], env=env, text=True, capture_output=True, check=True).stdout.strip() == expected


@pytest.mark.parametrize("script", ALL)
def test_help_submits_nothing(script):
    done = subprocess.run(["bash", SCRIPTS / script, "--help"], env={"PATH": "/usr/bin:/bin"}, text=True, capture_output=True, check=True)
    assert f"slurm/{script}" in done.stdout and "  --nodes=" in done.stdout


def test_without_a_cluster_it_is_told(tmp_path):
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    empty = tmp_path / "bin"
    empty.mkdir()
    for name in ("bash", "dirname", "hostname", "cat", "sed", "grep", "cut", "env", "sort", "tail", "tr"):
        (empty / name).symlink_to(subprocess.check_output(["which", name], text=True).strip())
    done = subprocess.run(["bash", SCRIPTS / "pretrain_moe.sh"], env=env | {"PATH": str(empty)}, text=True, capture_output=True)
    assert done.returncode == 2 and "error: there is no sbatch on" in done.stderr


def test_shellcheck_has_nothing_to_say():
    import shutil

    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    parts = [SCRIPTS / "lib" / name for name in ("node.sh", "rank.sh")]
    done = subprocess.run(["shellcheck", "-a", *sorted(SCRIPTS.glob("*.sh")), *parts], cwd=SCRIPTS.parent, text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "")
