"""What failures at the worst moment leave: the order of syncs and renames, a process killed before it publishes, and a rank 0 that
cannot read what the other ranks wait for."""

import os
import signal
from pathlib import Path

import pytest

from pretrain.checkpoint.directory import STATE_NAME, CheckpointDirectory
from tests.distributed import run_distributed
from tests.parallel.helpers import layout
from tests.parallel.training import Case, make_engine

STEPS = (10, 20)


def _save(saver, directory: CheckpointDirectory, step: int) -> None:
    from megatron_qsparse.parallel.checkpoint import Output

    partial = directory.partial(step)

    def publish(files) -> None:
        (partial / "trainer.json").write_text("{}")
        directory.publish(partial, {f"{STATE_NAME}/{name}": record for name, record in files.items()})

    saver.start([Output(directory=partial / STATE_NAME, prepare=lambda: directory.begin(step), publish=publish)])
    saver.wait()


def _record(rank: int, folder: Path) -> list[tuple[str, Path]]:
    """("sync" or "rename", path) in the order in which they were done during a save."""
    from megatron_qsparse.parallel.checkpoint import Saver

    events, fsync, rename = [], os.fsync, os.rename

    def recording_fsync(descriptor):
        fsync(descriptor)
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def recording_rename(source, target):
        rename(source, target)
        events.append(("rename", Path(target)))

    with layout() as parallel, pytest.MonkeyPatch.context() as patch:
        saver = Saver(make_engine(Case(), parallel))
        patch.setattr(os, "fsync", recording_fsync)
        patch.setattr(os, "rename", recording_rename)
        _save(saver, CheckpointDirectory(folder, keep_last=1), STEPS[0])
        saver.close()
    return events


def test_files_then_folders_are_synced_before_the_rename_and_the_parent_after_it(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    [events] = run_distributed(_record, 1, folder)
    directory = CheckpointDirectory(folder, keep_last=1)
    partial, published = directory.partial(STEPS[0]), directory.newest()
    end = events.index(("rename", published))
    assert events[end + 1 :] == [("sync", directory.path)]
    # torch writes .metadata beside its name, where it is synced, and renames it.
    made = [tmp_path, tmp_path / "run", folder, partial]
    assert events[: len(made)] == [("sync", path) for path in made], "each folder's entry in the one above it"
    synced = [
        path.with_name(".metadata") if path.name == ".metadata.tmp" else path for kind, path in events[len(made) : end] if kind == "sync"
    ]
    files = {partial / path.relative_to(published) for path in published.rglob("*") if path.is_file()}
    assert len(files) == 6 and set(synced[:-2]) == files
    assert synced[-2:] == [partial / STATE_NAME, partial], "a folder keeps the names that are in it by then"
    assert ("rename", partial / STATE_NAME / ".metadata") in events[: events.index(("sync", partial / STATE_NAME))]


def _die_before_the_rename(rank: int, folder: Path) -> None:
    from megatron_qsparse.parallel.checkpoint import Saver

    rename = os.rename

    def deadly_rename(source, target):
        if Path(target).name == f"step_{STEPS[1]:08d}":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    with layout() as parallel, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", deadly_rename)
        saver = Saver(make_engine(Case(), parallel))
        for step in STEPS:
            _save(saver, CheckpointDirectory(folder, keep_last=1), step)


def test_a_process_killed_before_it_publishes_leaves_the_checkpoint_before(tmp_path):
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_distributed(_die_before_the_rename, 1, tmp_path)
    directory = CheckpointDirectory(tmp_path, keep_last=1)
    partial = directory.partial(STEPS[1])
    assert (partial / "files.json").exists(), "everything but the name was there"
    assert [path.name for path in directory.published()] == ["step_00000010"] and directory.newest() == directory.published()[0]
    directory.begin(30)
    assert not partial.exists()


def _look_for_it(rank: int, path: Path) -> list[str]:
    from pretrain.progress import Progress
    from pretrain.resume import of_rank_0

    progress, told = Progress(), []
    for find in (lambda: path.read_text(), lambda: {}["key"]):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            of_rank_0(find, progress, "looking")
        told.append(f"{caught.type.__name__}: {caught.value}")
    assert of_rank_0(lambda: rank, progress, "looking") == 0
    # Rank 0 alone can take too long.
    assert (progress.now.phase, progress.now.limited) == (("waiting for rank 0, looking", False) if rank else ("looking", True))
    return told


def test_what_keeps_rank_0_from_a_checkpoint_every_rank_raises(tmp_path):
    first, second = run_distributed(_look_for_it, 2, tmp_path)
    assert first == second
    # A disk is told of in words, a mistake of the program with its traceback.
    assert first[0].startswith("ValueError: ") and str(tmp_path) in first[0]
    assert first[1].startswith("RuntimeError: rank 0 failed looking:") and "KeyError: 'key'" in first[1] and "Traceback" in first[1]
