"""Settings that differ from those of the checkpoint: told, and refused where they change the training unasked."""

import dataclasses

import pytest

from pretrain.changes import FREE, IDENTITY, OF_THE_START, compare, none, problems
from pretrain.config import PretrainConfig, dump_yaml, flatten, parse, to_dict


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(parse(["--optimizer.lr", "1e-3", "--train.steps", "100"])))
    return path


def _now(*arguments: str) -> PretrainConfig:
    return parse(["--optimizer.lr", "1e-3", "--train.steps", "100", *arguments])


def test_nothing_changed_is_nothing_to_tell(saved):
    assert compare(saved, _now()) == []


def test_layout_intervals_and_places_may_change_and_are_told(saved):
    changes = ["--parallel.tensor", "2", "--zero.stage", "2", "--checkpoint.interval", "7", "--data.path", "elsewhere"]
    assert compare(saved, _now(*changes)) == [
        "changed: parallel.tensor: 1 in the checkpoint, 2 now", "changed: zero.stage: 1 in the checkpoint, 2 now",
        "changed: data.path:  in the checkpoint, elsewhere now", "changed: checkpoint.interval: 0 in the checkpoint, 7 now",
    ]  # fmt: skip


CHANGES = ["--train.steps", "200", "--optimizer.lr", "2e-3", "--schedule.warmup_steps", "5"]


def test_what_changes_the_training_must_be_asked_for(saved):
    with pytest.raises(ValueError) as caught:
        compare(saved, _now(*CHANGES, "--parallel.tensor", "2"))
    text = str(caught.value)
    assert "train.steps: 100 in the checkpoint, 200 now" in text and "optimizer.lr: 0.001 in the checkpoint, 0.002 now" in text
    assert text.endswith("--allow_change train.steps,optimizer.lr,schedule.warmup_steps") and "parallel" not in text
    allowed = compare(saved, _now(*CHANGES, "--allow_change", "train.steps, optimizer,schedule.warmup_steps"))
    assert [line.split(":")[1].strip() for line in allowed] == ["train.steps", "optimizer.lr", "schedule.warmup_steps"]
    with pytest.raises(ValueError, match="--allow_change optimizer.lr$"):
        compare(saved, _now(*CHANGES, "--allow_change", "train.steps,schedule"))


def test_a_setting_that_came_later_had_its_default(saved):
    content = saved.read_text()
    assert "clip: 1.0" in content
    saved.write_text(content.replace("  clip: 1.0\n", ""))
    assert compare(saved, _now()) == [] and none(saved, _now())
    with pytest.raises(ValueError, match="optimizer.clip: 1.0 in the checkpoint, 0.5 now"):
        compare(saved, _now("--optimizer.clip", "0.5"))
    assert not none(saved, _now("--optimizer.clip", "0.5"))


def test_tags_may_come_and_go(tmp_path):
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(parse(["--tracking.tags.old", "1", "--tracking.tags.same", "2"])))
    assert compare(saved, parse(["--tracking.tags.same", "2", "--tracking.tags.new", "x"])) == [
        "changed: tracking.tags.new: (absent) in the checkpoint, x now", "changed: tracking.tags.old: 1 in the checkpoint, (absent) now",
    ]  # fmt: skip


def test_what_decides_which_samples_a_roll_back_leaves_out_must_be_asked_for(saved):
    changes = ["--spike.action", "rollback"]
    with pytest.raises(ValueError, match="--allow_change spike.action$"):
        compare(saved, _now(*changes))
    assert compare(saved, _now(*changes, "--allow_change", "spike")) == ["changed: spike.action: warn in the checkpoint, rollback now"]


def test_names_that_do_not_exist_are_told():
    assert problems(_now("--allow_change", "train.stpes,optimizer")) == [
        "allow_change=train.stpes,optimizer: there is no setting train.stpes; did you mean train.steps?"
    ]  # fmt: skip


def test_what_never_changes_cannot_be_allowed_to():
    for name in ("model.hidden_size", "qsparse", "train.seed"):
        (told,) = problems(_now("--allow_change", f"{name},train.steps"))
        assert f"{name} is part of what the run is and never changes" in told
    assert problems(_now("--allow_change", "train,data,optimizer")) == []
    for name in ("checkpoint", "data.path", "resume"):
        assert f"{name} may change at any start: leave it out" in problems(_now("--allow_change", f"optimizer,{name}"))[0]
    assert "no effect with resume=never" in problems(_now("--allow_change", "train.steps", "--resume", "never"))[0]


def test_every_setting_is_of_one_kind():
    """A new section must be put somewhere: what is neither free nor compared by identity needs to be allowed."""
    needs = {name for name in flatten(to_dict(PretrainConfig())) if not name.startswith(FREE + IDENTITY)} - set(OF_THE_START)
    fields = {f"optimizer.{field.name}" for field in dataclasses.fields(PretrainConfig().optimizer)}
    fields |= {f"schedule.{field.name}" for field in dataclasses.fields(PretrainConfig().schedule)}
    fields |= {f"spike.{field.name}" for field in dataclasses.fields(PretrainConfig().spike)}
    assert needs == fields | {"train.steps"}
