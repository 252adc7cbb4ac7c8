"""A run that starts with another run's weights: `checkpoint.start_from`."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.tensors import read_tensors
from pretrain.config import parse
from pretrain.validate import ConfigurationError, validate
from tests.pretrain.launch import TINY, losses, train
from tests.pretrain.test_checkpoints import flip

SETTINGS = ["--train.micro_batch_size", 2, "--train.global_batch_size", 8, "--validation.samples", 16, "--qsparse.keep", "0.4"]


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory) -> Path:
    """Four steps, with a milestone at the second."""
    run = tmp_path_factory.mktemp("first") / "run"
    train("--data.path", shards, *SETTINGS, "--train.steps", 4, "--checkpoint.milestone_interval", 2, "--output_dir", run, processes=1)
    return run


def _problems(shards: Path, first: Path, run: Path, *changes: str) -> str:
    arguments = [*TINY, "--data.path", shards, *SETTINGS, "--checkpoint.start_from", first, "--output_dir", run, *changes]
    try:
        validate(parse([str(argument) for argument in arguments]), world_size=1)
    except ConfigurationError as error:
        return str(error)
    return ""


def test_the_weights_are_taken_and_nothing_else(shards, first, tmp_path):
    """Without a learning rate they stay what they are. Seed, batch and layout are the new run's."""
    milestone, run = first / "checkpoints" / "milestone_00000002", tmp_path / "run"
    arguments = ["--data.path", shards, *SETTINGS, "--train.seed", 7, "--train.global_batch_size", 4, "--output_dir", run]
    output = train(*arguments, "--optimizer.lr", 0, "--train.steps", 1, "--checkpoint.start_from", milestone)
    assert f"starting with the weights of {milestone}" in output and "going on" not in output
    expected, found = read_tensors(milestone), read_tensors(run / "checkpoints" / "step_00000001")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items()) and "embedding.word_embeddings.weight" in expected
    assert json.loads((run / "checkpoints" / "step_00000001" / "trainer.json").read_text())["state"]["consumed_samples"] == 4

    # From here on the run has checkpoints of its own; where it started need not be there any more.
    allowed = ["--allow_change", "train.steps,optimizer.lr"]
    output = train(*arguments, "--train.steps", 2, *allowed, "--checkpoint.start_from", tmp_path / "gone")
    assert "going on after step 1" in output and "starting with" not in output
    assert sorted(losses(run)) == [1, 2]


def test_a_run_directory_stands_for_its_newest_checkpoint(shards, first, tmp_path):
    assert _problems(shards, first, tmp_path) == ""
    from pretrain.start import source

    config = parse(["--checkpoint.start_from", str(first), "--output_dir", str(tmp_path / "run")])
    assert source(config) == (first / "checkpoints" / "step_00000004").resolve()


def test_a_milestone_damaged_inside_is_refused_before_it_is_used(shards, first, tmp_path):
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    victim = copy / "checkpoints" / "milestone_00000002"
    flip(next((victim / "state").glob("*.distcp")))
    with pytest.raises(AssertionError, match=f"error: checkpoint.start_from: {victim} is not a complete checkpoint .*other contents"):
        train("--data.path", shards, *SETTINGS, "--checkpoint.start_from", victim, "--output_dir", tmp_path / "run", processes=1)
    assert not (tmp_path / "run").exists()


def test_what_cannot_work_is_refused_in_words(shards, first, tmp_path):
    run = tmp_path / "run"
    assert "holds another network: qsparse.keep: 0.4 in the checkpoint, 0.5 now" in _problems(shards, first, run, "--qsparse.keep", "0.5")
    assert "model.num_layers: 2 in the checkpoint, 3 now" in _problems(shards, first, run, "--model.num_layers", "3")
    assert "bitnet.enabled: False in the checkpoint, True now" in _problems(shards, first, run, "--bitnet.enabled", "true")
    assert "model.vocab_size: 512 in the checkpoint, 640 now" in _problems(shards, first, run, "--model.vocab_size", "640")
    for place, told in ((shards, "holds no checkpoints"), (shards / "manifest.json", "is a file")):
        message = _problems(shards, place, run)
        assert f"checkpoint.start_from: {place} {told}: name a run directory" in message and "show" not in message
    assert f"checkpoint.start_from: {tmp_path / 'gone'} is no directory" in _problems(shards, tmp_path / "gone", run)
    copy = Path(shutil.copytree(first, tmp_path / "copy")) / "checkpoints" / "step_00000004"
    (copy / "config.yaml").unlink()
    assert f"checkpoint.start_from: {copy} is damaged: config.yaml is missing" in _problems(shards, copy, run)
    trainer = first / "checkpoints" / "step_00000004" / "trainer.json"
    other = json.loads(trainer.read_text())
    other["identity"]["data.tokenizer"] = "0" * 64
    foreign = Path(shutil.copytree(first, tmp_path / "foreign"))
    path = foreign / "checkpoints" / "step_00000004" / "trainer.json"
    path.write_text(json.dumps(other, indent=1))
    assert f"data.tokenizer: {'0' * 64} in the checkpoint" in _problems(shards, foreign, run)
