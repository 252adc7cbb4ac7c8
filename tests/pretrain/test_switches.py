"""RUN_DIR/STOP and RUN_DIR/SAVE, set from outside while a run trains."""

import os
from functools import partial
from pathlib import Path

import pytest

from pretrain.callbacks import switches
from pretrain.callbacks.switches import END, END_FOLDER, END_NAME, NOTHING, SAVE, STOP, Switches
from tests.pretrain.launch import TIMEOUT_S, fail, training, wait_for_step


@pytest.fixture
def look_often(monkeypatch):
    monkeypatch.setattr(switches, "LOOK_S", 0.0)


def test_what_is_asked_for(tmp_path, look_often):
    found = Switches(tmp_path)
    assert found.look() == NOTHING
    (tmp_path / "SAVE").touch()
    assert (found.look(), found.look()) == (SAVE, NOTHING)
    (tmp_path / "STOP").touch()
    assert (found.look(), found.look()) == (STOP, STOP)


def test_what_a_signalled_job_leaves(tmp_path, look_often, monkeypatch):
    monkeypatch.setenv(END_FOLDER, str(tmp_path / "start"))
    found = Switches(tmp_path)
    assert found.look() == NOTHING
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / END_NAME).touch()
    assert (found.look(), found.look()) == (END, END)


def test_a_look_costs_nothing_most_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(switches, "LOOK_S", 3600.0)
    found = Switches(tmp_path)
    assert found.look() == NOTHING
    (tmp_path / "STOP").touch()
    assert found.look() == NOTHING


def _look_at_every_step(rank: int) -> None:
    switches.LOOK_S = 0.0


def _look_into(folder: Path, rank: int) -> None:
    switches.LOOK_S = 0.0
    os.environ[END_FOLDER] = str(folder)


def test_a_signal_that_reaches_no_process(shards, tmp_path):
    """As from Slurm, where it follows processes by cgroups: torchrun alone gets it."""
    run = tmp_path / "run"
    flags = ["--data.path", shards, "--output_dir", run, "--train.steps", 100_000, "--train.global_batch_size", 8]
    with training(*flags, before=partial(_look_into, tmp_path)) as process:
        wait_for_step(process, run, 2)
        (tmp_path / END_NAME).touch()
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0 and "SIGUSR1: checkpoint saved after step" in output, output


def test_save_and_stop(shards, tmp_path):
    run = tmp_path / "run"
    flags = ["--data.path", shards, "--output_dir", run, "--train.steps", 100_000, "--train.global_batch_size", 8]
    with training(*flags, before=_look_at_every_step) as process:
        wait_for_step(process, run, 2)
        (run / "SAVE").touch()
        while "SAVE: saving a checkpoint after step" not in process.output:
            assert process.poll() is None, process.output
        (run / "STOP").touch()
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, output
    assert not (run / "SAVE").exists() and "STOP is there: checkpoint saved after step" in output
    assert len(list((run / "checkpoints").glob("step_*"))) == 2
    refused = fail(*flags)
    assert f"error: {run / 'STOP'} is there, which stops the run: remove it to train on" in refused
