"""The thread that saves: nothing but a finished save counts as one, and what it leaves is durable. Foreign states are refused."""

import argparse
import os
import shutil
import sys
import threading
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.parallel.helpers import CPU, SEQUENCE, VARIANTS, layout
from tests.parallel.training import Case, make_engine

VOCABULARIES = (96, 160)


def _everything(rank: int, root: Path) -> dict:
    from megatron_qsparse.parallel import checkpoint
    from megatron_qsparse.parallel.checkpoint import Output

    with layout() as parallel:
        engine = make_engine(Case(), parallel)
        found = {
            "escape": _failure(engine, Output(directory=root / "escape", publish=lambda files: sys.exit(3))),
            "synced": _synced(engine, root / "synced"),
        }
        (root / "saved").mkdir()
        checkpoint.save(engine, root / "saved")
        found |= {size: _other_vocabulary(size, parallel, root / "saved") for size in VOCABULARIES}
        found |= {harm: _foreign(engine, harm, root) for harm in HARMS}
        found["niceness"] = _niceness(engine, root / "nice")
    return found


def _failure(engine, output) -> str:
    from megatron_qsparse.parallel.checkpoint import SaveError, Saver

    saver = Saver(engine)
    output.directory.mkdir(exist_ok=True)
    saver.start([output])
    with pytest.raises(SaveError) as caught:
        saver.wait()
    saver.close()
    return str(caught.value)


def _lost(rank: int, directory: Path) -> str:
    """Rank 1's thread waits in vain for rank 0's, whose preparation ends only after that."""
    from megatron_qsparse.parallel.checkpoint import Output, SaveError, Saver, saver

    gone = threading.Event()
    with layout() as parallel, pytest.MonkeyPatch.context() as patch:
        engine = make_engine(Case(), parallel)
        patch.setattr(saver, "GROUP_TIMEOUT", timedelta(seconds=10))
        patch.setattr(saver, "GRACE_S", 0.1)
        saving = Saver(engine)
        saving.start([Output(directory=directory, prepare=gone.wait)])
        thread = saving._task.thread
        with pytest.raises(SaveError) as caught:
            saving.wait()
        gone.set()
        thread.join()
        dist.barrier()
        saving.close()
    return str(caught.value)


def _alone_in_its_failure(rank: int, directory: Path) -> str:
    """Rank 1's thread fails while shares are put together, and rank 0's waits for it."""
    from megatron_qsparse.parallel.checkpoint import Output, SaveError, Saver, saver
    from megatron_qsparse.parallel.checkpoint.snapshot import Snapshot

    assemble, kept = Snapshot.assemble, []

    def failing(snapshot, group):
        assert snapshot.shares
        if rank == 1:
            kept.append((snapshot, group))
            raise MemoryError("no room for a tensor")
        assemble(snapshot, group)

    with layout() as parallel, pytest.MonkeyPatch.context() as patch:
        engine = make_engine(Case(stage=3), parallel)
        patch.setattr(Snapshot, "assemble", failing)
        patch.setattr(saver, "GROUP_TIMEOUT", timedelta(seconds=30))
        patch.setattr(saver, "GRACE_S", 0.1)
        saving = Saver(engine)
        saving.start([Output(directory=directory)])
        thread = saving._task.thread
        with pytest.raises(SaveError) as caught:
            while True:
                saving.poll()
        # Both have seen it: let rank 0's thread go on, to its next wait, and end there.
        dist.barrier()
        for snapshot, group in kept:
            assemble(snapshot, group)
            dist.all_gather_object([None] * 2, {1: "gave up"}, group=group)
        thread.join()
        dist.barrier()
        saving.close()
    return str(caught.value)


def _synced(engine, directory: Path) -> dict:
    """Sizes at the time of each fsync, which knows nothing of what Python still buffers, and of the files in the end."""
    from megatron_qsparse.parallel import checkpoint

    sizes, fsync, rename, directory = {}, os.fsync, os.rename, directory.absolute()

    def recording_fsync(descriptor):
        fsync(descriptor)
        sizes[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = os.fstat(descriptor).st_size

    def recording_rename(source, target):
        rename(source, target)
        sizes[Path(target).name] = sizes.pop(Path(source).name, None)

    directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recording_fsync)
        patch.setattr(os, "rename", recording_rename)
        checkpoint.save(engine, directory)
    return {"synced": sizes, "on disk": {path.name: path.stat().st_size for path in directory.iterdir()}}


def _other_vocabulary(size: int, parallel, saved: Path) -> str:
    from megatron_qsparse.models.gpt import build_model
    from megatron_qsparse.parallel.checkpoint import load_weights

    shape, qsparse, bitnet = VARIANTS["dense"]
    model = build_model(
        replace(shape, vocab_size=size), qsparse, bitnet, parallel, sequence_length=SEQUENCE, dtype=torch.float32, seed=0, device=CPU
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        load_weights(model, saved)
    return str(caught.value)


def _of_megatrons_trainer(path: Path) -> None:
    torch.save({"args": argparse.Namespace(num_layers=2), "checkpoint_version": 3.0, "iteration": 5}, path)


def _of_another_loop(path: Path) -> None:
    torch.save({"checkpoint_version": 3.0, "iteration": 5}, path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


HARMS = {
    "missing": (Path.unlink, "is missing"), "of Megatron's trainer": (_of_megatrons_trainer, "tells neither a format version"),
    "of another loop": (_of_another_loop, "tells neither a format version"), "cut": (_cut, "cannot be read (RuntimeError)"),
}  # fmt: skip


def _foreign(engine, harm: str, root: Path) -> str:
    from megatron_qsparse.parallel import checkpoint

    directory = Path(shutil.copytree(root / "saved", root / harm))
    HARMS[harm][0](directory / "common.pt")
    with pytest.raises(ValueError) as caught:
        checkpoint.load(engine, directory)
    return str(caught.value)


def _niceness(engine, directory: Path) -> list[int]:
    """Of the writing thread in a process that is nicer than it asks for. Only root may take niceness back."""
    from megatron_qsparse.parallel.checkpoint import Output, Saver

    os.nice(15 - os.nice(0))
    seen, saver = [], Saver(engine)
    directory.mkdir()
    output = Output(
        directory=directory, publish=lambda files: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    )  # fmt: skip
    saver.start([output])
    saver.wait()
    saver.close()
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("saver")


@pytest.fixture(scope="module")
def found(root) -> dict:
    return run_distributed(_everything, 1, root, timeout=300)[0]


def test_whatever_escapes_from_a_save_is_reported(found, root):
    assert found["escape"] == f"{root / 'escape'} was not written: rank 0: SystemExit: 3"


def test_a_failure_of_the_threads_own_communication_names_the_directory(pool, tmp_path):
    waiting, found = pool.run(_lost, 2, tmp_path)
    assert found.startswith(f"{tmp_path} was not written: RuntimeError: "), found
    assert waiting == f"{tmp_path} was not written: another rank failed and says why"


def test_a_thread_that_fails_alone_ends_the_save_on_every_rank(pool, tmp_path):
    first, second = pool.run(_alone_in_its_failure, 2, tmp_path)
    assert first == f"{tmp_path} was not written: another rank failed and says why"
    assert second == f"{tmp_path} was not written: MemoryError: no room for a tensor"


def test_every_byte_of_the_writers_files_was_synced(found):
    synced, on_disk = found["synced"]["synced"], found["synced"]["on disk"]
    assert synced == {name: on_disk[name] for name in (".metadata", "__0_0.distcp")}


@pytest.mark.parametrize("size", VOCABULARIES)
def test_weights_of_another_vocabulary_are_refused(found, root, size):
    """Megatron would cut them, or fill up with zeros."""
    for name in ("embedding.word_embeddings", "output_layer"):
        assert f"{name}.weight has the shape [128, 64] in {root / 'saved'}, [{size}, 64] in this model" in found[size]


@pytest.mark.parametrize("harm", HARMS)
def test_a_state_that_others_wrote_is_refused_in_words(found, root, harm):
    assert f"{root / harm} was not written by this project: its common.pt {HARMS[harm][1]}" in found[harm]


def test_a_process_that_is_nicer_already_saves(found):
    assert found["niceness"] == [15]
