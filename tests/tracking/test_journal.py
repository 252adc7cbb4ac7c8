"""The metrics journal: what is written reads back, whatever happened in between."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.tracking.journal import Journal, read_journal, truncate_after

AWKWARD = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**60, math.pi * 1e-30]


def write(path: Path, steps: range) -> None:
    journal = Journal(path)
    for step in steps:
        journal.append(step, {"train/loss": 1 / (step + 1)})
    journal.close()


def test_values_read_back_exactly(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    for step, value in enumerate(AWKWARD):
        journal.append(step, {"train/loss": value}, timestamp_ms=step)
    journal.close()
    rows = read_journal(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["timestamp_ms"], row["train/loss"]) for row in rows] == [(i, i, value) for i, value in enumerate(AWKWARD)]
    assert math.copysign(1, rows[4]["train/loss"]) == -1


def test_non_finite_values_are_valid_json_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal.append(0, {"nan": math.nan, "up": math.inf, "down": -math.inf, "one": 1.0})
    journal.close()
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (strict["nan"], strict["up"], strict["down"], strict["one"]) == ("NaN", "Infinity", "-Infinity", 1.0)
    row = read_journal(path)[0]
    assert math.isnan(row["nan"]) and row["up"] == math.inf and row["down"] == -math.inf


@pytest.mark.parametrize("tail", [b'{"step": 3, "timest', b"\x00" * 4096, b'{"step": 3}\n', b"\x00\n{"])
def test_a_damaged_tail_is_ignored_and_repaired(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    with path.open("ab") as file:
        file.write(tail)
    if tail.count(b"\n") <= tail.endswith(b"\n"):
        assert [row["step"] for row in read_journal(path)] == [0, 1, 2]
    write(path, range(3, 5))
    assert [row["step"] for row in read_journal(path)] == [0, 1, 2, 3, 4]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    path.write_bytes(path.read_bytes()[:-1])
    write(path, range(3, 4))
    assert [row["step"] for row in read_journal(path)] == [0, 1, 2, 3]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_journal(path)


def test_truncation_keeps_the_tail_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(10))
    assert truncate_after(path, 6) == path.stat().st_size
    write(path, range(7, 9))
    truncate_after(path, 4)
    assert [row["step"] for row in read_journal(path)] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in read_journal(tmp_path / "metrics.discarded.jsonl")] == [7, 8, 9, 5, 6, 7, 8]
    assert truncate_after(path, 4) == path.stat().st_size
    assert truncate_after(tmp_path / "none.jsonl", 4) == 0


def test_what_cannot_be_journaled_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="'step'"):
        journal.append(1, {"step": 3.0})
    with pytest.raises((TypeError, ValueError)):
        journal.append(1, {"train/loss": "high"})
    journal.close()


FULL_DISK = """
import logging, resource, sys
from pretrain.tracking.journal import Journal, read_journal
logging.basicConfig(format="%(message)s")
journal = Journal(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(100):
    journal.append(step, {"train/loss": 1 / (step + 1)})
written = len(read_journal(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append(100, {"train/loss": 0.0})
journal.close()
assert [row["step"] for row in read_journal(sys.argv[1])] == list(range(101))
print(written)
"""


def test_a_full_disk_warns_once_and_loses_nothing_when_there_is_room_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "metrics.jsonl")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert 0 < int(result.stdout) < 30
    assert result.stderr.count("cannot write") == 1
    assert "lines caught up, 0 lost" in result.stderr
