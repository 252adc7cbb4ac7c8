"""slurm/tokenize.sh: the elements of an array write what one machine would, also where some are put back into the queue."""

import time
from pathlib import Path

import pytest

from data_tools.cli import main as data_tools
from tests.data_tools.helpers import folder_bytes, write_jsonl
from tests.slurm.cluster import ENDED, Cluster
from tests.slurm.jobs import SCRIPTS, START_S, environment

pytestmark = pytest.mark.slurm
UNITS = 12
SCRIPT = SCRIPTS / "tokenize.sh"
SMALL_NODES = "--cpus-per-task=1 --mem-per-cpu=100 --time=10"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of files, each a unit, a tokenizer, and `single`: what one machine makes of them."""
    folder = tmp_path_factory.mktemp("corpus")
    for unit in range(UNITS):
        write_jsonl(folder / f"{unit:02d}.jsonl", [f"document {number} of file {unit}, and of file {unit % 5}" for number in range(40)])
    files = sorted(map(str, folder.glob("*.jsonl")))
    assert data_tools(["train-tokenizer", "--input", *files, "--vocab-size", "300", "--output", str(folder / "tokenizer")]) == 0
    assert data_tools([*map(str, flags(folder, folder / "single")), "--workers", "1"][1:]) == 0
    return folder


def flags(corpus: Path, output: Path) -> list[object]:
    """The command and its flags."""
    basis = ["", "tokenize", "--input", *sorted(corpus.glob("*.jsonl")), "--tokenizer", corpus / "tokenizer", "--output", output]
    return [*basis, "--unit-bytes", 500, "--block-tokens", 500, "--shard-tokens", 2000]


def submitted(cluster: Cluster, folder: Path, corpus: Path, options: str, **env: str) -> str:
    """`bash slurm/tokenize.sh`, as a user would; what it says."""
    env = environment(folder) | {"QSPARSE_SBATCH": f"{SMALL_NODES} {options}"} | env
    return cluster.client("bash", SCRIPT, *flags(corpus, folder / "out")[2:], cwd=folder, env=env, check=False)


def log(folder: Path, element: object) -> str:
    return "".join(path.read_text() for path in folder.glob(f"tokenize-*_{element}.out"))


def until(condition, what: str, folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}\n" + "\n".join(path.read_text() for path in folder.glob("*.out"))
        time.sleep(0.1)


def test_an_array_writes_what_one_machine_does(cluster, corpus, tmp_path):
    said = submitted(cluster, tmp_path, corpus, "--array=2-6:2", PYTHONPATH=str(Path(__file__).parent / "inside_tokenize"))
    job = said.split()[-1]
    elements = [f"{job}_{index}" for index in (2, 4, 6)]
    until(lambda: len(list(tmp_path.glob("waits.*"))) == 3, "all elements are at work", tmp_path)
    cluster.client("scontrol", "requeue", elements[1])
    cluster.client("scancel", "--batch", "--signal=USR1", elements[2])
    until(
        lambda: [cluster.job(element)["Restarts"] for element in elements] == ["0", "1", "1"],
        "two elements are in the queue again",
        tmp_path,
    )
    (tmp_path / "go").touch()
    for element in elements:
        found = cluster.wait(element, START_S)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), log(tmp_path, "*")
    assert folder_bytes(tmp_path / "out") == folder_bytes(corpus / "single")
    assert log(tmp_path, "*").count("written with") == 1
    assert [f"--part {part}/3 --workers 1" in log(tmp_path, index) for part, index in enumerate((2, 4, 6))] == [True] * 3
    assert f"USR1: goes on in this job: scontrol requeue {elements[2]}" in log(tmp_path, 6)
    assert f"job {elements[2]}, start 2" in log(tmp_path, 6)


def test_bad_input_and_no_second_try(cluster, corpus, tmp_path):
    env = environment(tmp_path) | {"QSPARSE_SBATCH": f"{SMALL_NODES} --array=0-1"}
    arguments = ["--input", "missing.jsonl", "--tokenizer", corpus / "tokenizer", "--output", "out"]
    job = cluster.client("bash", SCRIPT, *arguments, cwd=tmp_path, env=env).split()[-1]
    for element in (0, 1):
        found = cluster.wait(f"{job}_{element}", START_S)
        assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("FAILED", "2:0", "0"), log(tmp_path, element)
        lines = [line for line in log(tmp_path, element).splitlines() if "error" in line]
        assert lines == ["error: input missing.jsonl does not exist, check --input"]
    assert not (tmp_path / "out").exists()


def test_without_an_array_it_is_a_whole_job(cluster, corpus, tmp_path):
    """In another script of a user's, say."""
    command = " ".join(["bash", *map(str, [SCRIPT, *flags(corpus, tmp_path / "out")[2:]])])
    options = [*SMALL_NODES.split(), "--output=job.out"]
    job = cluster.sbatch(*options, "--wrap", command, cwd=tmp_path, env=environment(tmp_path))
    assert cluster.wait(job, START_S, ENDED)["JobState"] == "COMPLETED", (tmp_path / "job.out").read_text()
    assert "--part" not in (tmp_path / "job.out").read_text()
    assert folder_bytes(tmp_path / "out") == folder_bytes(corpus / "single")


def test_dry_run(cluster, corpus, tmp_path):
    said = submitted(cluster, tmp_path, corpus, "--array=0-3", DRY_RUN="1")
    assert "an element runs: python -m data_tools tokenize --input" in said and "--part I/N --workers 1" in said
    assert f"would run: sbatch {SMALL_NODES} --array=0-3 --nodes=1 {SCRIPT} --input" in said
    assert "to start at" in said.partition("sbatch --test-only")[2], said
    assert cluster.client("squeue", "-h", "--name=tokenize") == "" and not (tmp_path / "out").exists()
    # What cannot be submitted is told here.
    assert "Requested node configuration is not available" in submitted(cluster, tmp_path, corpus, "--cpus-per-task=99", DRY_RUN="1")
