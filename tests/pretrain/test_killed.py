"""A run whose processes are killed, wherever they are then, and that is started again, is the unbroken run bit for bit."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from data_tools.reader import TokenDataset
from pretrain.lease import FOLDER
from tests.pretrain.finished import GLOBAL_BATCH, Finished, start
from tests.pretrain.killing import POINTS, STEPS, Kill
from tests.pretrain.launch import TIMEOUT_S


@dataclasses.dataclass(frozen=True)
class Trial:
    seed: int
    kills: tuple[Kill, ...]
    together: bool
    """Whether the other process dies with the one that is killed, or finds out."""

    @classmethod
    def draw(cls, seed: int) -> "Trial":
        """By turns at all points; every third is killed again, anywhere, after it was started again."""
        random, points = Random(seed), list(POINTS)
        kills = [Kill.draw(points[seed % len(points)], random)]
        if seed % 3 == 2:
            kills.append(Kill.draw(random.choice(points), random))
        return cls(seed, tuple(kills), bool(random.randrange(2)))

    def __str__(self) -> str:
        return f"{self.seed}-{self.kills[0].point.replace(' ', '_')}"


TRIALS = [Trial.draw(seed) for seed in range(50)]
IN_MAKE_TEST = 5


def test_the_unbroken_run_takes_every_sample_once_an_epoch(unbroken, shards):
    epoch = TokenDataset(shards, "train", 32, 0, 8, GLOBAL_BATCH).epoch_samples
    assert GLOBAL_BATCH < epoch < STEPS * GLOBAL_BATCH, "the run must pass the end of an epoch"
    assert sorted(unbroken.samples) == list(range(1, STEPS + 1)) == [row["step"] for row in unbroken.metrics if row["step"]]
    order = [sample for ids in unbroken.samples.values() for sample in ids]
    assert len(order) == STEPS * GLOBAL_BATCH and sorted(order[:epoch]) == list(range(epoch))


@pytest.fixture(scope="module")
def kill_log(pytestconfig) -> Iterator[list[str]]:
    """Rows of a table; written at the end where `--kill-log FILE` asks for it."""
    rows: list[str] = []
    yield rows
    if path := pytestconfig.getoption("--kill-log"):
        head = [
            "| trial | killed at | other process | went on after step | steps taken again | losses, weights, samples, MLflow |",
            "|---" * 6 + "|",
        ]
        Path(path).write_text("\n".join([*head, *rows, ""]))


@pytest.mark.parametrize("trial", [pytest.param(t, id=str(t), marks=[pytest.mark.matrix] * (t.seed >= IN_MAKE_TEST)) for t in TRIALS])
def test_killed_and_started_again(trial, unbroken, shards, database, tmp_path, kill_log):
    shutil.copy(database, tmp_path)
    resumed, killed = [], []
    for kill in (*trial.kills, None):
        with start(tmp_path, shards, kill=kill) as process:
            process.together = trial.together
            output, _ = process.communicate(TIMEOUT_S)
        resumed += [line.split()[4].rstrip(",") for line in output.splitlines() if line.startswith("going on after step")]
        if kill is None:
            assert process.returncode == 0, output
        elif process.processes[kill.rank].exitcode == 0:
            # A second kill may be due later than the rest of the run is long.
            assert kill != trial.kills[0], f"{kill} was never reached\n{output}"
        else:
            assert process.processes[kill.rank].exitcode == -9, output
            killed.append(str(kill))
    assert Finished.read(tmp_path).differences(unbroken) == []
    assert not (tmp_path / "run" / FOLDER).exists()
    times = [len((folder / "samples.jsonl").read_text().splitlines()) for folder in (tmp_path, unbroken.folder)]
    # 2 processes take 2 micro-batches each.
    again = (times[0] - times[1]) / 4
    other = "dies too" if trial.together else "finds out"
    row = (trial.seed, "; then ".join(killed), other, ", ".join(resumed) or "0", f"{again:g}", "equal")
    kill_log.append("| " + " | ".join(map(str, row)) + " |")
