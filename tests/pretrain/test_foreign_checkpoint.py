"""A checkpoint whose files want to run code, in the hands of every command."""

import shutil
from pathlib import Path

import pytest

from pretrain import plan
from pretrain.checkpoint import files
from pretrain.checkpoint.cli import main
from tests import malice
from tests.pretrain.launch import TINY, fail, train

SETTINGS = ["--train.micro_batch_size", 1, "--train.global_batch_size", 4, "--validation.samples", 4, "--train.steps", 2]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("foreign") / "run"
    train("--data.path", shards, *SETTINGS, "--checkpoint.interval", 1, "--output_dir", run, processes=1)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """Both checkpoints made by somebody who knows checksums, too."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    attack, _ = malice.attacks(tmp_path / "canary")["getattr"]
    for checkpoint in (run / "checkpoints").iterdir():
        malice.in_metadata(checkpoint / "state", attack)
        (checkpoint / files.FILES_NAME).unlink()
        files.seal(checkpoint, {})
    return run


def test_no_command_runs_what_a_checkpoint_names(shards, run, tmp_path, capsys):
    newest = run / "checkpoints" / "step_00000002"
    named = f"{newest / 'state' / '.metadata'} names builtins.getattr, which no state of this project does: nothing of it was run"
    for command, status in ({"verify": 1, "show": 2, "list": 0, "prune": 2}).items():
        more = ["--keep-last", "1"] if command == "prune" else []
        assert main([command, str(run), *more]) == status, command
        captured = capsys.readouterr()
        assert command == "list" or named in captured.out + captured.err, command
    assert len(list((run / "checkpoints").iterdir())) == 2
    common = [*TINY, "--data.path", shards, *SETTINGS]
    elsewhere = [*common, "--output_dir", tmp_path / "other", "--checkpoint.start_from", run]
    for arguments in ([*common, "--output_dir", run], elsewhere):
        assert plan.main([str(argument) for argument in arguments]) == 0
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("road", ["resume", "start_from"])
def test_a_run_refuses_to_go_on_from_it(road, shards, run, tmp_path):
    where = ["--output_dir", tmp_path / "other", "--checkpoint.start_from", run] if road == "start_from" else ["--output_dir", run]
    more = ["--train.steps", 3, "--allow_change", "train.steps"]
    output = fail("--data.path", shards, *SETTINGS, *more, *where, processes=1)
    assert "step_00000002/state/.metadata names builtins.getattr" in output and "Traceback" not in output, output
    assert not (tmp_path / "canary").exists() and not (tmp_path / "other").exists()
