"""Every command of the README works as written, in the order in which it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Lines of the fenced blocks, and the inline commands that start with `python -m`, in reading order."""
    blocks = [(match.start(), line) for match in re.finditer(r"^```\n(.*?)^```", README, re.M | re.S) for line in match[1].splitlines()]
    inline = [(match.start(), match[1].replace("\n", " ")) for match in re.finditer(r"`(python -m [^`]+)`", README)]
    return [command for _, command in sorted(blocks + inline, key=lambda item: item[0])]


def test_make_targets_exist():
    targets = re.findall(r"(?:`|^)make ([a-z-]+)", README, re.M)
    assert {"quickstart", "test", "install", "gpu-smoke"} <= set(targets)
    for target in sorted(set(targets)):
        plan = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert plan.returncode == 0, plan.stderr
    assert "-m pretrain.quickstart" in subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True).stdout


def test_commands_run_as_written(tmp_path):
    shutil.copytree(ROOT / "pretrain" / "configs", tmp_path / "pretrain" / "configs")
    scripts = Path(sys.executable).parent
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment |= {"PATH": f"{scripts}:{environment['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(command: str) -> None:
        result = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"

    # Those of a cluster are run by tests/slurm.
    elsewhere = ("make ", "source ", "export ", "DRY_RUN=", "sbatch ")
    listed = [command for command in commands() if not command.startswith(elsewhere)]
    corpus = next(command for command in listed if "corpus stdlib" in command)
    modules = {command.split(" -m ")[1].split()[0] for command in listed}
    assert {"data_tools", "pretrain.plan", "pretrain.train", "pretrain.tracking", "pretrain.compare", "pretrain.status"} <= modules
    # The reader's own corpus is stood in for by the one that the README offers.
    for command in [corpus, *(other for other in listed if other != corpus)]:
        run(command)
    assert (tmp_path / "report" / "index.html").exists()
    assert list((tmp_path / "runs" / "a" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["data_tools", "tokenize", "--input", "a", "--tokenizer", "b", "--output", "c", "--overwr"],
        ["pretrain.checkpoint", "prune", "a", "--keep", "2"],
        ["pretrain.tracking", "sync", "a", "--ur", "b"],
        ["pretrain.compare", "a", "--out", "b"],
        ["pretrain.status", "a", "--js"],
        ["pretrain.quickstart", "--step", "2"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_command_takes_a_part_of_a_flag(arguments, tmp_path):
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "unrecognized arguments" in result.stderr or "are required" in result.stderr, result.stderr
    assert list(tmp_path.iterdir()) == []
