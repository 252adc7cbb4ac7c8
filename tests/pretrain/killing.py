"""SIGKILL at named points of a training run: what a node that loses power does, at the worst moments.

Installed in the test's own processes before training begins; nothing in the project knows of it.
"""

import json
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unittest import mock

import torch

STEPS, SAVES, MILESTONES = 12, 4, 3
"""Of the run that is killed, which saves every 3 steps and writes a milestone every 4."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Where and when one process dies."""

    point: str
    detail: str
    rank: int
    count: int
    """The time at which that place is reached, from 1."""

    def __str__(self) -> str:
        return f"{self.point}: {self.detail}, rank {self.rank}, time {self.count}"

    def install(self) -> None:
        """Patch this process."""
        POINTS[self.point][self.detail](_Countdown(self.count))

    @classmethod
    def draw(cls, point: str, random: Random) -> "Kill":
        """Anywhere in the run."""
        detail = random.choice(sorted(POINTS[point]))
        times = {"save": SAVES, "publish": SAVES + MILESTONES, "prune": SAVES - KEPT, "journal write": STEPS, "shipping": 2}
        # What rank 0 alone does, kills rank 0.
        rank = random.randrange(2) if point in ("forward", "backward", "step", "save") else 0
        return cls(point=point, detail=detail, rank=rank, count=random.randint(1, times.get(point, STEPS)))


KEPT = 2


class _Countdown:
    def __init__(self, count: int):
        self.left = count

    def __call__(self) -> bool:
        """Whether it is time. Dies by itself where nothing is left to do half-way: `die`."""
        self.left -= 1
        return self.left == 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _patch(where: str, wrap: Callable[[Callable], Callable]) -> None:
    """Replace a function by `wrap` of it, for the rest of the process."""
    patcher = mock.patch(where)
    original, _ = patcher.get_original()
    patcher.new = wrap(original)
    patcher.start()


def _before(where: str) -> Callable[[_Countdown], None]:
    def install(due: _Countdown) -> None:
        def wrap(original):
            def wrapped(*args, **kwargs):
                if due():
                    die()
                return original(*args, **kwargs)

            return wrapped

        _patch(where, wrap)

    return install


def _after(where: str) -> Callable[[_Countdown], None]:
    def install(due: _Countdown) -> None:
        def wrap(original):
            def wrapped(*args, **kwargs):
                result = original(*args, **kwargs)
                if due():
                    die()
                return result

            return wrapped

        _patch(where, wrap)

    return install


def _in_layer(backward: bool) -> Callable[[_Countdown], None]:
    """In the second micro-batch's pass through the last layer."""

    def install(due: _Countdown) -> None:
        def wrap(build):
            def wrapped(*args, **kwargs):
                engine = build(*args, **kwargs)
                calls = 0

                def hook(module, inputs, output):
                    nonlocal calls
                    calls += torch.is_grad_enabled()
                    if not torch.is_grad_enabled() or calls % 2 or not due():
                        return
                    if backward:
                        output[0].register_hook(lambda gradient: die())
                    else:
                        die()

                engine.model.decoder.layers[-1].register_forward_hook(hook)
                return engine

            return wrapped

        _patch("pretrain.run.build_engine", wrap)

    return install


def _in_optimizer(due: _Countdown) -> None:
    """AdamW has updated this rank's fp32 shard, nobody has the new weights."""

    def wrap(build):
        def wrapped(*args, **kwargs):
            engine = build(*args, **kwargs)
            adamw = engine.optimizer.optimizer
            step = adamw.step

            def dying(*args, **kwargs):
                step(*args, **kwargs)
                if due():
                    die()

            adamw.step = dying
            return engine

        return wrapped

    _patch("pretrain.run.build_engine", wrap)


def _half_a_file(due: _Countdown) -> None:
    """The tensors' file is written in part; with it, earlier ones of this save may be whole."""

    def wrap(write):
        def wrapped(recorder, data):
            if len(data) > 4096 and due():
                write(recorder, bytes(data)[: len(data) // 2])
                recorder.flush()
                die()
            return write(recorder, data)

        return wrapped

    _patch("megatron_qsparse.parallel.checkpoint.writing._Recorder.write", wrap)


def _half_removed(due: _Countdown) -> None:
    def wrap(rmtree):
        def wrapped(path, *args, **kwargs):
            if str(path).endswith(".removed") and due():
                next(file for file in sorted(Path(path).rglob("*")) if file.is_file()).unlink()
                die()
            return rmtree(path, *args, **kwargs)

        return wrapped

    _patch("pretrain.checkpoint.directory.shutil.rmtree", wrap)


def _half_a_line(due: _Countdown) -> None:
    def wrap(write):
        def wrapped(journal):
            if journal.path.name == "metrics.jsonl" and due():
                os.write(journal._descriptor, b"".join(journal._waiting)[:40])
                die()
            return write(journal)

        return wrapped

    _patch("pretrain.tracking.journal.Journal._write_waiting", wrap)


def _listing_without_name(due: _Countdown) -> None:
    """files.json is there, the directory still has its partial name."""
    _after("pretrain.checkpoint.directory.seal")(due)


POINTS: dict[str, dict[str, Callable[[_Countdown], None]]] = {
    "publish": {
        "before the listing": _before("pretrain.checkpoint.directory.seal"),
        "before the name": _listing_without_name,
        "before old ones go": _before("pretrain.checkpoint.directory.CheckpointDirectory._clean_up"),
    },
    "step": {"optimizer": _in_optimizer, "before": _before("deepspeed.runtime.engine.DeepSpeedEngine.step")},
    "prune": {"set aside": _after("pretrain.checkpoint.directory._set_aside"), "half removed": _half_removed},
    "journal write": {"half a line": _half_a_line, "before": _before("pretrain.tracking.journal.Journal._write_waiting")},
    "shipping": {
        "before": _before("mlflow.MlflowClient.log_batch"),
        "before it is noted": _after("mlflow.MlflowClient.log_batch"),
    },
    "save": {"half a file": _half_a_file, "start": _after("megatron_qsparse.parallel.checkpoint.saver.Saver.start")},
    "forward": {"last layer": _in_layer(backward=False)},
    "backward": {"last layer": _in_layer(backward=True)},
}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Called in each process of a run: writes down the samples that training takes, and installs the kill."""

    samples: Path
    kill: Kill | None = None
    session: str = field(default_factory=lambda: secrets.token_hex(4))

    def __call__(self, rank: int) -> None:
        # Patched before anybody imports these names from where they are defined.
        import deepspeed.runtime.engine  # noqa: F401
        import mlflow  # noqa: F401

        import pretrain.run
        from data_tools.reader import TokenDataset

        file, session = self.samples.open("a"), self.session

        class Recorded(TokenDataset):
            def __iter__(self):
                per_step = self.global_batch_size // self.data_parallel_size // self.micro_batch_size
                for number, batch in enumerate(super().__iter__()):
                    first = self.consumed_samples // self.global_batch_size + number // per_step + 1
                    entry = {
                        "step": first,
                        "micro_batch": number % per_step,
                        "rank": rank,
                        "session": session,
                        "ids": batch["sample_ids"].tolist(),
                    }
                    file.write(json.dumps(entry) + "\n")
                    file.flush()
                    yield batch

        pretrain.run.TokenDataset = Recorded
        if self.kill is not None and rank == self.kill.rank:
            self.kill.install()


def consumed(samples: Path) -> dict[int, list[int]]:
    """step -> sample ids in it, over all ranks in order; of a step taken again the last time counts."""
    steps: dict[int, tuple[str, dict[tuple[int, int], list[int]]]] = {}
    for line in samples.read_text().splitlines():
        entry = json.loads(line)
        session, parts = steps.get(entry["step"], ("", {}))
        if session != entry["session"]:
            parts = {}
        parts[entry["rank"], entry["micro_batch"]] = entry["ids"]
        steps[entry["step"]] = entry["session"], parts
    return {step: [sample for _, ids in sorted(parts.items()) for sample in ids] for step, (_, parts) in sorted(steps.items())}
