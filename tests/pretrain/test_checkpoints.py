"""Checkpoint directories: what is kept, what counts as complete, and what is said about the rest."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.checkpoint.directory import CheckpointDirectory, remove, step_of
from pretrain.checkpoint.files import FILES_NAME, damage
from pretrain.checkpoint.inspection import one_checkpoint
from pretrain.config import PretrainConfig
from pretrain.going_on import beginning


class Warnings(list):
    __call__ = list.append


def flip(path: Path) -> None:
    """Another byte, the same size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextlib.contextmanager
def without_root() -> Iterator[Path]:
    """A directory of a user to whom permissions apply, and this process as that user."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def directory(tmp_path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "checkpoints", keep_last=2, warn=Warnings())


def _publish(directory: CheckpointDirectory, step: int, content: str = "weights", kind: str = "step") -> Path:
    partial = directory.begin(step, kind)
    (partial / "state" / "part_0.bin").write_text(content)
    (partial / "trainer.json").write_text("{}")
    return directory.publish(partial)


def test_nothing_yet_is_no_checkpoint(directory):
    assert directory.newest() is None and directory.complete() == [] and directory.warn == []


def test_the_last_ones_are_kept_and_the_newest_is_found(directory):
    paths = [_publish(directory, step) for step in (5, 10, 100, 20)]
    # Step 20 counts what came before it; step 100 took step 5 away.
    assert [path.name for path in directory.complete()] == ["step_00000010", "step_00000020", "step_00000100"]
    assert directory.newest() == paths[2] and step_of(paths[2]) == 100
    assert directory.warn == []


def test_one_far_enough_back_is_kept_where_signals_have_asked_for_many(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep_last=2, reach=100)
    seen = []
    for step in (100, 110, 120, 130, 200, 210, 220, 300, 400):
        _publish(directory, step)
        seen.append([step_of(path) for path in directory.complete()])
    assert seen[:4] == [[100], [100, 110], [100, 110, 120], [100, 120, 130]], "the oldest will be the first that is far enough"
    assert seen[4:] == [[100, 130, 200], [100, 200, 210], [100, 210, 220], [100, 220, 300], [300, 400]]


def test_who_has_lost_the_run_unknowingly_does_not_write_into_its_successors_checkpoint(tmp_path):
    lost, present = (CheckpointDirectory(tmp_path, keep_last=2, owner=owner) for owner in ("aa", "bb"))
    theirs = lost.begin(10)
    ours = present.begin(10)
    assert ours != theirs and not theirs.exists(), "what is left of others is removed"
    (ours / "state" / "part_0.bin").write_text("weights")
    assert present.publish(ours).name == "step_00000010" == present.newest().name


def test_those_not_to_be_looked_at_are_passed_over_and_reading_is_told(directory):
    older, newer = _publish(directory, 5), _publish(directory, 10)
    read = []
    assert directory.newest(without=[newer], progress=read.append) == older
    assert sum(read) == sum(path.stat().st_size for path in older.rglob("*") if path.is_file() and path.name != FILES_NAME)
    assert directory.newest(without=[older, newer]) is None


@pytest.mark.parametrize("keep_last", [1, 3])
def test_keep_last_counts(tmp_path, keep_last):
    directory = CheckpointDirectory(tmp_path, keep_last=keep_last)
    for step in range(1, 6):
        _publish(directory, step)
    assert [step_of(path) for path in directory.complete()] == list(range(6 - keep_last, 6))


def test_every_file_is_listed_with_size_and_hash(directory):
    listing = json.loads((_publish(directory, 1) / FILES_NAME).read_text())
    assert listing["format_version"] == 2
    assert set(listing["files"]) == {"state/part_0.bin", "trainer.json"}
    assert listing["files"]["state/part_0.bin"]["size"] == 7 and len(listing["files"]["state/part_0.bin"]["sha256"]) == 64


DAMAGES = {
    "cut file": (lambda path: (path / "state/part_0.bin").write_text("wei"), "state/part_0.bin has 3 bytes instead of 7"),
    "missing file": (lambda path: (path / "state/part_0.bin").unlink(), "state/part_0.bin is missing"),
    "missing files.json": (lambda path: (path / FILES_NAME).unlink(), "files.json: .*No such file"),
    "cut files.json": (lambda path: (path / FILES_NAME).write_text('{"files": {'), "files.json: "),
    "empty files.json": (lambda path: (path / FILES_NAME).write_text(""), "files.json: "),
    "foreign files.json": (lambda path: (path / FILES_NAME).write_text("[]"), "files.json: "),
    "entry without a size": (lambda path: (path / FILES_NAME).write_text('{"files": {"trainer.json": 3}}'), "files.json: "),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_is_used(directory, kind):
    harm, words = DAMAGES[kind]
    older, newer = _publish(directory, 10), _publish(directory, 20)
    harm(newer)
    assert directory.newest() == older
    assert len(directory.warn) == 1 and str(newer) in directory.warn[0] and "the one before" in directory.warn[0]
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(directory.warn[0])
    assert directory.complete() == [older] and damage(older) is None


def test_a_flipped_byte_in_the_one_to_load_is_found(directory):
    older, newer = _publish(directory, 10), _publish(directory, 20)
    flip(newer / "state" / "part_0.bin")
    assert directory.newest() == older
    assert "part_0.bin has other contents" in directory.warn[0]


def test_damaged_ones_do_not_push_out_complete_ones(directory):
    first = _publish(directory, 10)
    (_publish(directory, 20) / "trainer.json").unlink()
    third = _publish(directory, 30)
    assert directory.complete() == [first, third], "two complete ones are kept, whatever lies between"


def test_what_was_just_published_does_not_make_way_for_a_later_damaged_one(tmp_path):
    """By sizes the later one is complete, and nobody reads it again at every save."""
    directory = CheckpointDirectory(tmp_path, keep_last=1, warn=Warnings())
    first = CheckpointDirectory(tmp_path, keep_last=2)
    older, later = _publish(first, 10), _publish(first, 20)
    flip(later / "state" / "part_0.bin")
    assert directory.newest() == older
    published = _publish(directory, 15)
    assert directory.published() == [published, later] and directory.newest() == published
    last = _publish(directory, 20, "again")
    assert directory.published() == [last] and directory.newest() == last


def test_an_old_one_that_cannot_be_removed_is_warned_of_and_the_new_one_is_published():
    with without_root() as folder:
        directory = CheckpointDirectory(folder, keep_last=1, warn=Warnings())
        old = _publish(directory, 10)
        (old / "state").chmod(0o555)
        new = _publish(directory, 20)
        assert directory.newest() == new == directory.published()[-1]
        assert len(directory.warn) == 1 and f"{old} could not be removed: " in directory.warn[0] and "part_0.bin" in directory.warn[0]
        [left] = folder.glob("step_00000010.*.removed")
        # Begun, published and removed again: what is left of the first does not stand in the way.
        again = _publish(directory, 10)
        assert again == directory.published()[0] and len(directory.warn) == 1
        (left / "state").chmod(0o755)
        last = _publish(directory, 30)
        assert list(folder.iterdir()) == [last] and len(directory.warn) == 1


def test_one_that_is_gone_already_is_no_error_to_remove(directory):
    path = _publish(directory, 10)
    remove(path)
    remove(path)
    assert list(directory.path.iterdir()) == []


def test_what_another_process_is_removing_is_left_alone_by_a_new_save(directory):
    doomed = directory.path / "step_00000010.0123abcd.removed"
    (doomed / "state").mkdir(parents=True)
    directory.begin(20)
    assert doomed.is_dir()


def test_a_file_that_cannot_be_read_is_a_damage_in_words():
    with without_root() as folder:
        directory = CheckpointDirectory(folder, keep_last=2, warn=Warnings())
        older, newer = _publish(directory, 10), _publish(directory, 20)
        (newer / "state" / "part_0.bin").chmod(0)
        assert damage(newer) is None and damage(newer, contents=True) == "state/part_0.bin cannot be read: Permission denied"
        assert directory.newest() == older


def test_all_damaged_is_an_error_after_each_was_named(directory):
    """Starting over would overwrite what could still be restored."""
    for step in (1, 2):
        (_publish(directory, step) / "trainer.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged: restore one, or move"):
        directory.newest()
    assert ["step_00000002" in directory.warn[0], "step_00000001" in directory.warn[1]] == [True, True]


def test_an_interrupted_write_is_no_checkpoint_and_is_begun_anew(directory):
    complete = _publish(directory, 10)
    partial = directory.begin(20)
    (partial / "state" / "half.bin").write_text("ha")
    (directory.path / "step_00000012.partial").mkdir()
    (directory.path / "notes").mkdir()
    assert directory.newest() == complete and directory.warn == []
    again = directory.begin(20)
    assert again == partial and not list((again / "state").iterdir())
    assert not (directory.path / "step_00000012.partial").exists(), "another step's leftovers only cost space"
    assert [step_of(path) for path in directory.complete()] == [10]
    published = _publish(directory, 20)
    assert not partial.exists() and directory.newest() == published


def test_a_step_can_be_published_again(directory):
    """After a resume from an older checkpoint, also over a damaged one."""
    (_publish(directory, 10, "old weights") / "trainer.json").unlink()
    path = _publish(directory, 10, "new")
    assert directory.newest() == path and (path / "state/part_0.bin").read_text() == "new"
    assert damage(path) is None and directory.warn == []


def test_the_default_warning_goes_to_stderr(tmp_path, capsys):
    directory = CheckpointDirectory(tmp_path, keep_last=1)
    (_publish(directory, 3) / "trainer.json").unlink()
    with pytest.raises(ValueError):
        directory.newest()
    assert capsys.readouterr().err.startswith("warning: ")


def test_milestones_are_not_pruned_nor_taken_for_checkpoints(directory):
    milestones = [_publish(directory, step, kind="milestone") for step in (5, 10, 40)]
    steps = [_publish(directory, step) for step in (10, 20, 30)]
    assert [path.name for path in milestones] == ["milestone_00000005", "milestone_00000010", "milestone_00000040"]
    assert directory.complete("milestone") == milestones and directory.complete() == steps[1:]
    assert directory.newest() == steps[2]
    assert directory.superfluous(1, "milestone") == milestones[:2]


def test_a_begun_milestone_and_a_begun_step_leave_each_other_alone(directory):
    step, milestone = directory.begin(10), directory.begin(10, "milestone")
    assert step.is_dir() and milestone.is_dir() and step != milestone


def test_what_interrupted_saves_left_is_removed_whatever_its_kind(directory):
    """A disk that a milestone has filled would stay full."""
    left = directory.begin(20, "milestone")
    directory.begin(30)
    assert not left.exists()


def test_leftovers_that_cannot_be_removed_do_not_stop_a_save():
    with without_root() as folder:
        directory = CheckpointDirectory(folder, keep_last=1, warn=Warnings())
        left = directory.begin(10)
        (left / "state" / "part_0.bin").write_text("half")
        (left / "state").chmod(0o555)
        assert directory.newest() is None and _publish(directory, 20) == directory.newest()
        assert len(directory.warn) == 1 and f"{left}, of an interrupted save, could not be removed: " in directory.warn[0]
        next(folder.glob("step_00000010.*/state")).chmod(0o755)


def test_one_that_is_replaced_is_not_lost_where_its_successor_cannot_be_published(directory, monkeypatch):
    old, rename = _publish(directory, 10, "old"), Path.rename

    def failing(path, target):
        if path.name.endswith(".partial"):
            raise OSError("no such luck")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="no such luck"):
            _publish(directory, 10, "new")
    assert directory.newest() == old and (old / "state/part_0.bin").read_text() == "old"
    # A process that died in between leaves it aside; the next save brings it back.
    old.rename(old.with_name(f"{old.name}.0123abcd.removed"))
    _publish(directory, 20)
    assert directory.complete()[0] == old and [path.name for path in directory.path.iterdir() if "removed" in path.name] == []


def test_the_newest_is_what_was_written_last(directory):
    """Not the milestone of a later step, which a run left behind that went back to an earlier checkpoint."""
    abandoned, step = _publish(directory, 40, kind="milestone"), _publish(directory, 30)
    listing = json.loads((abandoned / FILES_NAME).read_text())
    (abandoned / FILES_NAME).write_text(json.dumps(listing | {"created": "2026-01-01T00:00:00+01:00"}))
    assert one_checkpoint(directory.path) == step.resolve()


def test_of_one_save_the_whole_state_is_taken_although_the_milestone_is_sealed_after_it(directory):
    step, milestone = _publish(directory, 30), _publish(directory, 30, kind="milestone")
    for path, created in ((step, "2026-01-01T00:00:00+00:00"), (milestone, "2026-01-01T00:00:01+00:00")):
        listing = json.loads((path / FILES_NAME).read_text())
        (path / FILES_NAME).write_text(json.dumps(listing | {"created": created}))
    assert one_checkpoint(directory.path) == step.resolve()


def test_milestones_alone_are_not_started_over(directory):
    _publish(directory, 40, kind="milestone")
    with pytest.raises(ValueError, match="the last of step 40, but no checkpoint to go on from.*choose another output_dir"):
        beginning(PretrainConfig(), None, None, directory, print)


def test_what_the_writers_know_is_not_read_again_but_compared(directory):
    partial = directory.begin(7)
    (partial / "state" / "part_0.bin").write_text("weights")
    known = SimpleNamespace(size=7, sha256="of the writer")
    path = directory.publish(partial, {"state/part_0.bin": known})
    assert json.loads((path / FILES_NAME).read_text())["files"]["state/part_0.bin"]["sha256"] == "of the writer"
    partial = directory.begin(8)
    (partial / "state" / "part_0.bin").write_text("wei")
    with pytest.raises(OSError, match="has 3 bytes, but 7 were written"):
        directory.publish(partial, {"state/part_0.bin": known})
    with pytest.raises(OSError, match="part_1.bin was written and is not there"):
        directory.publish(directory.begin(9), {"state/part_1.bin": known})
    assert [step_of(p) for p in directory.published()] == [7]


def test_a_listing_of_a_newer_format_is_no_complete_checkpoint(directory):
    path = _publish(directory, 3)
    content = json.loads((path / FILES_NAME).read_text())
    (path / FILES_NAME).write_text(json.dumps(content | {"format_version": 99}))
    assert "format 99 is newer" in damage(path)


def test_the_listing_of_the_format_before_is_read(directory):
    path = _publish(directory, 3)
    content = json.loads((path / FILES_NAME).read_text())
    (path / FILES_NAME).write_text(json.dumps({"format_version": 1, "files": content["files"]}))
    assert damage(path, contents=True) is None
