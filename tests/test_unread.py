"""`... | head`: whoever reads the output of a command line may end before all is written."""

import os
import subprocess
import sys

import pytest

COMMANDS = [
    "pretrain.plan --suggest --nodes 2 --gpu h100-80 --config pretrain/configs/7b_qsparse.yaml --model.vocab_size 32000",
    "pretrain.plan --help",
    "pretrain.status --help",
    "pretrain.checkpoint list --help",
    "pretrain.compare --help",
    "pretrain.tracking --help",
    "data_tools tokenize --help",
]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_is_not_read_is_no_error(command, unbuffered):
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command.split()], env=environment, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
