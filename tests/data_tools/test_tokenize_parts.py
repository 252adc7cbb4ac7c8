"""Several parts do one job: the bytes of a single run, whichever of them run, when, and how they end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import DataError
from data_tools.parts import Part
from data_tools.shared import SharedJob
from data_tools.tokenize import TokenizeResult, tokenize
from tests.data_tools.helpers import ENVIRONMENT, SMALL, assert_clear_error, command, folder_bytes, job_options, run, write_jsonl
from tests.data_tools.stopping import stopped
from tests.overtaking import overtake

UNITS = 24
MOMENTS = {"hash": "hash/*.npz", "tokenize": "tokens/*.npz", "join": "shards/train-*.json"}
"""Files of the work folder, of which there are some during that pass."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> list[Path]:
    """Files of a unit each; every third document is a duplicate."""
    folder = tmp_path_factory.mktemp("inputs")
    generator = random.Random(1)
    files = []
    for index in range(UNITS):
        lines = [f"{index} {number} {generator.choice(texts)}" if number % 3 else texts[number] for number in range(24)]
        files.append(write_jsonl(folder / f"{index:03d}.jsonl", lines))
    return files


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, inputs: list[Path], tokenizer: Path) -> dict[str, bytes]:
    """What a single run writes."""
    output = tmp_path_factory.mktemp("single") / "out"
    tokenize(inputs, tokenizer, output, job_options(backend="tokenizers"), workers=1)
    return folder_bytes(output)


class Parts:
    """Starts parts, and whole jobs, of the job over `inputs`."""

    def __init__(self, inputs: list[Path], tokenizer: Path, output: Path) -> None:
        self.inputs, self.tokenizer, self.output = inputs, tokenizer, output
        self.work = output / ".tokenize"
        self.processes: list[subprocess.Popen] = []

    def arguments(self, *more: object) -> list[object]:
        basis = ["tokenize", "--input", *self.inputs, "--tokenizer", self.tokenizer, "--output", self.output, *SMALL]
        return [*basis, "--backend", "tokenizers", "--unit-bytes", 20_000, "--workers", 1, *more]

    def start(self, *more: object) -> subprocess.Popen:
        pipe = subprocess.PIPE
        self.processes.append(subprocess.Popen(command(*self.arguments(*more)), env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True))
        return self.processes[-1]

    def start_until(self, moment: str, *more: object) -> subprocess.Popen:
        """Stopped in the middle of that pass, of which it has done something, with all its locks."""
        there = len(list(self.work.glob(MOMENTS[moment])))
        self.processes.append(stopped(self.work, MOMENTS[moment], there + 2, *self.arguments(*more)))
        assert not (self.output / "manifest.json").exists()
        return self.processes[-1]

    def here(self, part: str, **changes: Any) -> TokenizeResult:
        options = job_options(backend="tokenizers", **changes.pop("options", {}))
        return tokenize(self.inputs, self.tokenizer, self.output, options, 1, unit_bytes=20_000, part=Part.parse(part), **changes)


@pytest.fixture
def parts(inputs: list[Path], tokenizer: Path, tmp_path: Path) -> Iterator[Parts]:
    found = Parts(inputs, tokenizer, tmp_path / "out")
    yield found
    for process in found.processes:
        process.kill()
        process.communicate()


def ended(process: subprocess.Popen) -> str:
    """What it printed. Fails where it failed."""
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return out


def killed(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("count", [2, 3])
def test_at_the_same_time(count: int, parts: Parts, single: dict[str, bytes]) -> None:
    outputs = [ended(process) for process in [parts.start("--part", f"{index}/{count}") for index in range(count)]]
    assert folder_bytes(parts.output) == single
    assert sum("written with tokenizers" in output for output in outputs) == 1, outputs


def test_one_after_the_other_and_with_one_missing(parts: Parts, single: dict[str, bytes]) -> None:
    assert parts.here("1/3").already_there is False
    assert folder_bytes(parts.output) == single
    assert [parts.here(part).already_there for part in ("0/3", "2/3", "1/3")] == [True] * 3
    assert folder_bytes(parts.output) == single


def test_with_one_missing(parts: Parts, single: dict[str, bytes]) -> None:
    for process in [parts.start("--part", part) for part in ("0/3", "2/3")]:
        ended(process)
    assert folder_bytes(parts.output) == single


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(moment: str, parts: Parts, single: dict[str, bytes]) -> None:
    process = parts.start_until(moment, "--part", "0/2")
    kept = {path: path.stat().st_mtime_ns for path in parts.work.glob("hash/*.npz")}
    killed(process)
    second = parts.start_until(moment, "--part", "1/2")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    first = parts.start("--part", "0/2")
    killed(second)
    ended(first)
    # It ended while the second one joined, or did all that was left.
    parts.here("1/2")
    assert folder_bytes(parts.output) == single


@pytest.mark.parametrize("moment", ["hash", "tokenize"])
def test_nobody_waits_for_a_part_that_stands_still(moment: str, parts: Parts, single: dict[str, bytes]) -> None:
    process = parts.start_until(moment, "--part", "0/3")
    assert parts.here("2/3").manifest is not None
    assert parts.work.exists(), "the first part is still at work there"
    process.send_signal(signal.SIGCONT)
    assert "already there" in ended(process)
    assert folder_bytes(parts.output) == single


def test_the_joining_part_dies(parts: Parts, single: dict[str, bytes]) -> None:
    joining = parts.start_until("join", "--part", "0/2")
    assert parts.here("1/2").manifest is None
    assert "part 1/2 is done, another part joins the shards" in ended(parts.start("--part", "1/2"))
    killed(joining)
    published = {path: path.stat().st_mtime_ns for path in parts.output.glob("*.tar")}
    assert len(published) >= 2
    assert parts.here("1/2").already_there is False
    assert folder_bytes(parts.output) == single
    assert {path: path.stat().st_mtime_ns for path in published} == published


def test_parts_of_different_jobs_are_refused(parts: Parts, inputs: list[Path], single: dict[str, bytes]) -> None:
    first = parts.start_until("hash", "--part", "0/2")
    with pytest.raises(DataError, match="with other inputs, tokenizer or options: start all parts with the same command"):
        parts.here("1/2", options={"block_tokens": 3000})
    with pytest.raises(DataError, match="with other --unit-bytes: start all parts"):
        tokenize(inputs, parts.tokenizer, parts.output, job_options(backend="tokenizers"), 1, part=Part(1, 2))
    status = inputs[0].stat()
    os.utime(inputs[0], ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    try:
        with pytest.raises(DataError, match="with other times of the inputs: start all parts"):
            parts.here("1/2")
    finally:
        os.utime(inputs[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert_clear_error(run(*parts.arguments("--part", "1/2", "--text-field", "body")), "other parts are writing to", parts.output)
    first.send_signal(signal.SIGCONT)
    ended(first)
    assert folder_bytes(parts.output) == single


def test_a_part_and_a_whole_job_refuse_each_other(parts: Parts, single: dict[str, bytes]) -> None:
    first = parts.start_until("tokenize", "--part", "0/2")
    assert_clear_error(run(*parts.arguments()), "another tokenize is writing to")
    killed(first)
    whole = parts.start_until("join")
    assert_clear_error(run(*parts.arguments("--part", "0/2")), "another tokenize is writing to")
    killed(whole)
    parts.here("0/2")
    assert folder_bytes(parts.output) == single


def test_overwrite_replaces_another_job_once(parts: Parts, single: dict[str, bytes]) -> None:
    parts.here("0/2", options={"block_tokens": 3000})
    with pytest.raises(DataError, match="holds the shards of another job"):
        parts.here("0/2")
    assert [parts.here(part, overwrite=True).already_there for part in ("0/2", "1/2")] == [False, True]
    assert folder_bytes(parts.output) == single


def test_the_last_part_was_killed_before_it_tidied_up(parts: Parts, single: dict[str, bytes]) -> None:
    parts.here("0/2")
    (parts.work / "tokens").mkdir(parents=True)
    assert parts.here("1/2").already_there
    assert folder_bytes(parts.output) == single and not parts.work.exists()


@pytest.mark.parametrize("other", ["begins", "ends"])
def test_another_part_begins_or_ends_the_job_between_two_looks(
    other: str, parts: Parts, single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is none of somebody else's files."""
    parts.output.mkdir()
    overtake(monkeypatch, parts.work, parts.work.mkdir if other == "begins" else partial(parts.here, "0/2"))
    assert parts.here("1/2").already_there == (other == "ends")
    assert folder_bytes(parts.output) == single


def test_another_part_ends_the_job_before_its_state_is_read(
    parts: Parts, single: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts.work.mkdir(parents=True)
    (parts.work / "job.json").write_text("{}")
    read = SharedJob.read_state

    def too_late(job: SharedJob) -> dict[str, Any]:
        monkeypatch.setattr(SharedJob, "read_state", read)
        parts.here("0/2")
        return read(job)

    monkeypatch.setattr(SharedJob, "read_state", too_late)
    assert parts.here("1/2").already_there
    assert folder_bytes(parts.output) == single


def test_an_input_changes_while_parts_read_it(parts: Parts, tmp_path: Path, inputs: list[Path], texts: list[str]) -> None:
    parts.inputs = [*inputs[1:], write_jsonl(tmp_path / "changes.jsonl", texts[:9])]
    first, second = parts.start_until("hash", "--part", "0/3"), parts.start_until("hash", "--part", "1/3")
    write_jsonl(parts.inputs[-1], texts[9:19])
    second.send_signal(signal.SIGCONT)
    assert "changes.jsonl has changed while it was read" in second.communicate(timeout=60)[1]
    with pytest.raises(DataError, match="an input has changed while other parts read it"):
        parts.here("2/3")
    first.send_signal(signal.SIGCONT)
    assert "changes.jsonl has changed while it was read" in first.communicate(timeout=60)[1]
    parts.here("2/3")
    expected = tokenize(parts.inputs, parts.tokenizer, tmp_path / "expected", job_options(backend="tokenizers"), workers=1)
    assert folder_bytes(parts.output) == folder_bytes(expected.manifest.directory)


def test_token_files_that_a_machine_lost(parts: Parts, single: dict[str, bytes]) -> None:
    killed(parts.start_until("tokenize", "--part", "0/1"))
    for path in parts.work.glob("tokens/*.train"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=".train was lost when the machine went down"):
        parts.here("0/1")
    parts.here("0/1")
    assert folder_bytes(parts.output) == single


@pytest.mark.parametrize("part", ["3/3", "1", "-1/3", "0/0", "a/b", "1/3/5", ""])
def test_what_is_no_part(part: str, parts: Parts) -> None:
    result = run(*parts.arguments(f"--part={part}"))
    assert result.returncode == 2 and "is not I/N with 0 <= I < N" in result.stderr


@pytest.mark.parametrize("units", [0, 1, 5, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_part_comes_by_every_unit(units: int, count: int) -> None:
    parts = [Part(index, count) for index in range(count)]
    for part in parts:
        assert sorted([*part.own(units), *part.others(units)]) == list(range(units))
    assert sorted(unit for part in parts for unit in part.own(units)) == list(range(units))


def test_helpers_of_one_stripe_share_it() -> None:
    """All but part 3 have done their own, and now each a unit at a time of what part 3 has left."""
    helpers: list[Iterator[int]] = [iter([u for u in Part(i, 8).others(64) if u % 8 == 3]) for i in range(8) if i != 3]
    first: list[int] = [next(helper) for helper in helpers]
    assert len(set(first)) == 7
