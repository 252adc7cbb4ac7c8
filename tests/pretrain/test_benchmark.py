"""The throughput benchmark measures what it says, on real processes."""

import json
import subprocess
import sys

import pytest

from pretrain.benchmark import main


def test_modes_on_tensor_parallel_ranks(tmp_path):
    output = tmp_path / "modes.json"
    command = [sys.executable, "-m", "pretrain.benchmark", "--modes", "--tensor", "2", "--rounds", "2", "--device", "cpu"]
    result = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    assert (found["processes"], found["tensor_parallel"], found["rounds"], found["device"]) == (2, 2, 2, "cpu")
    assert list(found["runs"]) == ["groups", "block", "global", "dense"] and found["runs"]["groups"]["ratio_to_groups"] == 1
    assert all(run["tokens_per_s"] > 0 for run in found["runs"].values())


def test_ranks_that_do_not_divide_are_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--tensor", "3"])
    assert left.value.code == 2 and "--processes 2 is not a multiple of --tensor 3" in capsys.readouterr().err
