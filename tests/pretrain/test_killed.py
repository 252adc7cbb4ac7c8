"""A run whose processes are killed, wherever they are then, and that is started again, is the unbroken run bit for bit."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from data_tools.reader import TokenDataset
from pretrain.lease import FOLDER
from pretrain.tracking.store import connect
from tests.pretrain.killing import KEPT, POINTS, STEPS, Kill, Watched, consumed
from tests.pretrain.launch import TIMEOUT_S, journal, training
from tests.pretrain.test_resume import tensors

GLOBAL_BATCH = 32
ARGUMENTS = [
    *("--train.precision", "bf16", "--bitnet.enabled", "true", "--bitnet.subln", "true", "--qsparse.keep", "0.4", "--optimizer.lr", "3e-3"),
    *("--train.micro_batch_size", 8, "--train.global_batch_size", GLOBAL_BATCH, "--train.steps", STEPS, "--schedule.warmup_steps", 2),
    *("--checkpoint.interval", 3, "--checkpoint.keep_last", KEPT, "--checkpoint.milestone_interval", 4),
    *("--validation.interval", 5, "--validation.samples", 32, "--tracking.enabled", "true"),
]
DETERMINISTIC = ("train/", "val/", "sparsity/")
"""Metrics that a run which is broken must repeat; the others are times and memory."""


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


@dataclasses.dataclass(frozen=True)
class Finished:
    """What is compared of a run that reached its end."""

    folder: Path
    metrics: list[dict[str, float]]
    samples: dict[int, list[int]]
    tensors: dict[str, torch.Tensor]
    record: dict
    checkpoints: list[str]
    shipped: dict[str, list[tuple[int, float]]]

    @classmethod
    def read(cls, folder: Path) -> "Finished":
        run = folder / "run"
        last = run / "checkpoints" / f"step_{STEPS:08d}"
        client, run_id = connect(_uri(folder)), (run / "run_id").read_text().strip()
        assert len(client.search_runs([client.get_run(run_id).info.experiment_id])) == 1
        rows = [{name: value for name, value in row.items() if name == "step" or name.startswith(DETERMINISTIC)} for row in journal(run)]
        names = sorted({name for row in rows for name in row} - {"step"})
        return cls(
            folder, rows, consumed(folder / "samples.jsonl"), tensors(last),
            {name: value for name, value in json.loads((last / "trainer.json").read_text()).items() if name != "run_id"},
            sorted(path.name for path in (run / "checkpoints").iterdir()),
            {name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)] for name in names},
        )  # fmt: skip


def _uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def _start(folder: Path, shards: Path, kill: Kill | None = None):
    places = ["--data.path", shards, "--output_dir", folder / "run", "--tracking.uri", _uri(folder)]
    return training(*places, *ARGUMENTS, before=Watched(samples=folder / "samples.jsonl", kill=kill))


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """MLflow's, with its tables: making them takes longer than training."""
    folder = tmp_path_factory.mktemp("database")
    connect(_uri(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(scope="module")
def unbroken(shards, database, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("unbroken")
    shutil.copy(database, folder)
    with _start(folder, shards) as process:
        output, _ = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, output
    return Finished.read(folder)


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
    resumed = []
    for kill in (*trial.kills, None):
        with _start(tmp_path, shards, kill) as process:
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
    found = Finished.read(tmp_path)
    assert found.metrics == unbroken.metrics
    assert found.samples == unbroken.samples
    assert found.record == unbroken.record
    assert [name for name in unbroken.tensors if not torch.equal(unbroken.tensors[name], found.tensors[name])] == []
    assert found.tensors.keys() == unbroken.tensors.keys()
    assert found.checkpoints == unbroken.checkpoints
    assert found.shipped == unbroken.shipped
    assert not (tmp_path / "run" / FOLDER).exists()
    again = len((tmp_path / "samples.jsonl").read_text().splitlines()) - len((unbroken.folder / "samples.jsonl").read_text().splitlines())
    kills = "; then ".join(map(str, trial.kills))
    row = (trial.seed, kills, "dies too" if trial.together else "finds out", ", ".join(resumed) or "0", f"{again / 4:g}", "equal")
    kill_log.append("| " + " | ".join(map(str, row)) + " |")
