"""A run that is tracked, saves often and passes the end of an epoch, and what is compared of it once it has ended."""

import dataclasses
import json
from pathlib import Path

import torch

from pretrain.checkpoint.tensors import read_tensors
from pretrain.tracking.store import connect
from tests.pretrain.forked import ForkedRun
from tests.pretrain.killing import KEPT, STEPS, Kill, Watched, consumed
from tests.pretrain.launch import journal, training

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
        client, run_id = connect(uri(folder)), (run / "run_id").read_text().strip()
        assert len(client.search_runs([client.get_run(run_id).info.experiment_id])) == 1
        rows = [{name: value for name, value in row.items() if name == "step" or name.startswith(DETERMINISTIC)} for row in journal(run)]
        names = sorted({name for row in rows for name in row} - {"step"})
        return cls(
            folder, rows, consumed(folder / "samples.jsonl"), read_tensors(last),
            {name: value for name, value in json.loads((last / "trainer.json").read_text()).items() if name != "run_id"},
            sorted(path.name for path in (run / "checkpoints").iterdir()),
            {name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)] for name in names},
        )  # fmt: skip

    def differences(self, other: "Finished") -> list[str]:
        """What is not the same in both, bit for bit."""
        names = ("metrics", "samples", "record", "checkpoints", "shipped")
        found = [name for name in names if getattr(self, name) != getattr(other, name)]
        equal = self.tensors.keys() == other.tensors.keys() and all(torch.equal(self.tensors[n], other.tensors[n]) for n in self.tensors)
        return found + ([] if equal else ["tensors"])


def uri(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def start(folder: Path, shards: Path, *more: object, kill: Kill | None = None, processes: int = 2) -> ForkedRun:
    places = ["--data.path", shards, "--output_dir", folder / "run", "--tracking.uri", uri(folder)]
    return training(*places, *ARGUMENTS, *more, processes=processes, before=Watched(samples=folder / "samples.jsonl", kill=kill))
