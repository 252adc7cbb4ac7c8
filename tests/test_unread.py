"""`... | head`: whoever reads the output of a command line may end before all is written."""

import os
import subprocess
import sys

import pytest

SEEN_ENOUGH = 141
"""What a shell tells of a program that SIGPIPE has ended."""


def _unread(*arguments: object, unbuffered: str = "", errors_too: bool = False) -> tuple[int, str | None]:
    """(exit status, stderr) of Python, whose output goes to a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=write,
            stderr=write if errors_too else subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(write)
    return done.returncode, done.stderr


PLAN = "pretrain.plan --suggest --nodes 2 --gpu h100-80 --config pretrain/configs/7b_qsparse.yaml --model.vocab_size 32000"


@pytest.mark.parametrize(
    "command",
    [
        PLAN,
        "pretrain.plan --help",
        "pretrain.train --help",
        "pretrain.status --help",
        "pretrain.checkpoint list --help",
        "data_tools tokenize --help",
    ],
)
def test_output_that_waits_to_the_end_leaves_the_status_alone(command):
    assert _unread("-m", *command.split()) == (0, "")


def test_what_a_command_writes_is_not_read(unbroken, shards, tmp_path):
    """Nor is it the fault of a disk."""
    run = unbroken.folder / "run"
    for command in (
        PLAN.split(),
        ["pretrain.status", run],
        ["pretrain.checkpoint", "list", run],
        ["pretrain.tracking", "status", run],
        ["pretrain.compare", run, "--output", tmp_path / "report", "--require-under-unigram", 100],
        ["data_tools", "stats", shards],
    ):
        assert _unread("-m", *command, unbuffered="1") == (SEEN_ENOUGH, ""), command


ENDS = {
    "print('x'); return 1": (1, SEEN_ENOUGH),
    "print('x'); sys.exit(2)": (2, SEEN_ENOUGH),
    "print('x', file=sys.stderr); return 2": (2, 2),
    "return 0": (0, 0),
}
SNIPPET = "import os, sys; from data_tools.arguments import exit_status\ndef main(): {}\nsys.exit(exit_status(main))"


@pytest.mark.parametrize("end", ENDS)
def test_no_failure_becomes_a_success(end):
    buffered, unbuffered = ENDS[end]
    assert _unread("-c", SNIPPET.format(end))[0] == buffered
    assert _unread("-c", SNIPPET.format(end), unbuffered="1")[0] == unbuffered


def test_a_crash_is_told():
    status, errors = _unread("-c", SNIPPET.format("print('x'); 1 / 0"))
    assert status != 0 and "ZeroDivisionError" in errors


def test_a_broken_pipe_of_something_else_is_told():
    end = "read, write = os.pipe(); os.close(read); os.write(write, b'x')"
    done = subprocess.run([sys.executable, "-c", SNIPPET.format(end)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr


def test_errors_that_are_not_read_either_keep_the_status_from_being_0():
    """`2>&1 | head`."""
    assert _unread("-m", "pretrain.status", "nowhere", errors_too=True)[0] == 2
    assert _unread("-m", "data_tools", "verify", "nowhere", errors_too=True)[0] == SEEN_ENOUGH


def test_without_an_output_at_all():
    done = subprocess.run(f"{sys.executable} -m pretrain.status --help >&-", shell=True, timeout=60)
    assert done.returncode == 0
