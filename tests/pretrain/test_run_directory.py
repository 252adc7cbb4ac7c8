"""A run directory that cannot be written: told in a line, by all ranks, before anything is built."""

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.lease import Lease
from pretrain.run_directory import own, problems
from tests.overtaking import overtake
from tests.pretrain.launch import TIMEOUT_S, TINY, training
from tests.pretrain.test_bad_input import refused, run
from tests.pretrain.test_checkpoints import without_root
from tests.pretrain.test_disk import tmpfs

BATCH = ["--train.micro_batch_size", 1, "--train.global_batch_size", 4, "--validation.samples", 4, "--train.steps", 2]


def test_what_is_writable_is_no_problem_and_nothing_is_made(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert problems(tmp_path) == problems(tmp_path / "new" / "run") == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_in_the_way_is_named(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("")
    link.symlink_to("nowhere")
    for path, culprit in ((file, f"{file} is a file"), (file / "run", f"{file} is a file"), (link, f"{link} is a link to nothing")):
        [problem] = problems(path)
        wanted = f"output_dir: {path} cannot be written ({culprit}, and a directory is needed): choose another output_dir"
        assert problem.startswith(wanted)


def test_a_folder_that_another_rank_makes_between_two_looks_is_no_file(tmp_path, monkeypatch):
    run = tmp_path / "run"
    overtake(monkeypatch, run, run.mkdir)
    assert problems(run) == [] and run.is_dir()


def test_missing_permissions_are_named():
    with without_root() as folder:
        locked, run = folder / "locked", folder / "run"
        locked.mkdir(mode=0o555)
        run.mkdir()
        (run / "metrics.jsonl").touch(mode=0o444)
        for path, culprit in ((locked, locked), (locked / "new", locked), (run, run / "metrics.jsonl")):
            [problem] = problems(path)
            assert f"output_dir: {path} cannot be written ({culprit} is write-protected for user {os.geteuid()}" in problem


def test_a_place_that_only_refuses_when_it_is_written_is_told_then():
    """Whose permissions promise more than the file system keeps."""
    place = Path("/proc/run")
    with pytest.raises(ValueError, match="^output_dir: /proc/run cannot be written .*choose another output_dir"):
        own(Lease(place), print)


def test_a_read_only_file_system_is_refused_before_anything_starts(shards, tmp_path):
    with tmpfs(tmp_path / "disk", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        arguments = [*TINY, "--data.path", shards, *BATCH, "--output_dir", disk / "run"]
        message = refused(run("pretrain.train", *arguments))
        assert message.startswith(f"error: output_dir: {disk / 'run'} cannot be written ({disk} ") and message.count("\n") == 1
        assert f"problem: {message.removeprefix('error: ').strip()}" in run("pretrain.plan", *arguments).stdout


def _refused_by_both(shards: Path, directory: Path, before: Callable[[int], None] | None = None) -> str:
    """What is told, once both ranks have ended by themselves."""
    with training("--data.path", shards, *BATCH, "--output_dir", directory, before=before) as run:
        for process in run.processes:
            process.join(TIMEOUT_S)
        assert [process.exitcode for process in run.processes] == [2, 2], run.output
        output = run.output
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert "Traceback" not in output and len(lines) == 2, output
    assert [line.partition(": ")[0] for line in lines] == ["error", "error (rank 1)"]
    return lines[0]


def test_a_full_disk_is_refused_by_all_ranks_before_the_model_is_built(shards, tmp_path):
    with tmpfs(tmp_path / "disk", 1) as disk:
        (disk / "ballast").write_bytes(b"0" * ((1 << 20) - (16 << 10)))
        line = _refused_by_both(shards, disk / "run")
        assert line.startswith(f"error: output_dir: {disk / 'run'} cannot be written (No space left on device")
        assert [path.name for path in disk.iterdir()] == ["ballast"]


@dataclass(frozen=True)
class InTheWay:
    """A folder takes the place of config.yaml after everything was looked at."""

    path: Path

    def __call__(self, rank: int) -> None:
        import pretrain.run

        start = pretrain.run.start_tracking
        pretrain.run.start_tracking = lambda *args: (self.path.mkdir(), start(*args))[1]


def test_what_fails_when_the_run_begins_to_write_ends_all_ranks(shards, tmp_path):
    path = tmp_path / "run" / "config.yaml"
    line = _refused_by_both(shards, tmp_path / "run", InTheWay(path))
    assert f"cannot be written (Is a directory: {path})" in line


@pytest.mark.parametrize(("name", "make"), [("checkpoints", Path.touch), ("metrics.jsonl", Path.mkdir)])
def test_what_is_of_another_kind_than_a_run_needs_is_told_before_it_starts(tmp_path, name, make):
    make(tmp_path / name)
    [told] = problems(tmp_path)
    assert f"{tmp_path / name} is {'no folder' if name == 'checkpoints' else 'a folder'}, which a run needs otherwise" in told
