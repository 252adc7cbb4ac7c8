"""Loss spikes: what is one, and how a run goes back before it and on behind its samples."""

import dataclasses
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from pretrain import plan, rollback
from pretrain.callbacks.batches import BatchFolder
from pretrain.callbacks.spikes import observe
from pretrain.checkpoint.directory import REMOVED, CheckpointDirectory
from pretrain.checkpoint.tensors import read_tensors
from pretrain.config import PretrainConfig, SpikeConfig, parse
from pretrain.trainer import RollBack, StepReport, TrainerState
from pretrain.validate import examine
from tests.pretrain import notified
from tests.pretrain.killing import Watched, consumed
from tests.pretrain.launch import TIMEOUT_S, TINY, journal, training

SETTINGS = SpikeConfig(window=16, threshold=6, min_increase=0.3, patience=3)


def _run(losses: list[float], settings: SpikeConfig = SETTINGS) -> list[int]:
    """Positions at which a spike is told."""
    state = TrainerState()
    return [
        position for position, loss in enumerate(losses)
        if observe(state, loss, settings) is not None and state.high_losses == settings.patience
    ]  # fmt: skip


def test_what_is_a_spike():
    noise = random.Random(0)
    quiet = [4 - 0.01 * step + noise.gauss(0, 0.05) for step in range(60)]
    assert _run(quiet) == []
    for height, length, told in ((1.0, 3, [32]), (1.0, 2, []), (1.0, 9, [32]), (0.2, 9, [])):
        spiky = [loss + height * (30 <= step < 30 + length) for step, loss in enumerate(quiet)]
        assert _run(spiky) == told, (height, length)
    # No judgement before the window is full; what is not finite is for others to count.
    assert _run([9.0 if 5 <= step < 10 else loss for step, loss in enumerate(quiet)]) == []
    assert _run([float("nan") if step in (31, 33) else loss + (30 <= step < 35) for step, loss in enumerate(quiet)]) == [34]
    # A loss that stays high is told once and becomes what is usual.
    assert _run([loss + (step >= 30) for step, loss in enumerate(quiet)]) == [32]


def test_a_state_that_was_written_and_read_decides_alike():
    noise = random.Random(1)
    losses = [3 + noise.gauss(0, 0.1) + 2 * (step % 25 > 20) for step in range(100)]
    whole, parts = TrainerState(), TrainerState()
    for loss in losses:
        parts = TrainerState(**json.loads(json.dumps(vars(parts))))
        assert observe(whole, loss, SETTINGS) == observe(parts, loss, SETTINGS)
    assert whole == parts


REFUSED = [
    ({"spike.action": "rollback"}, "spike.action=rollback needs checkpoints to go back to: set checkpoint.interval"),
    (
        {"spike.action": "rollback", "checkpoint.interval": 50},
        "checkpoint.keep_last=2 of checkpoint.interval=50 steps does not reach the 103 steps back that spike.rollback_steps and "
        "spike.patience ask for: set checkpoint.keep_last=4",
    ),
]


@pytest.mark.parametrize(("changed", "told"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_roll_backs_without_checkpoints_to_go_back_to_are_refused(changed, told):
    config = PretrainConfig()
    for name, value in changed.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, value)
    problems, *_ = examine(config, world_size=1)
    assert told in problems


STEPS, SPIKE = 20, range(13, 15)
ARGUMENTS = [
    *("--train.micro_batch_size", 2, "--train.global_batch_size", 8, "--validation.samples", 8, "--train.steps", STEPS),
    *("--checkpoint.interval", 2, "--checkpoint.keep_last", 4, "--spike.window", 8, "--spike.patience", 2, "--spike.rollback_steps", 4),
]


@dataclass(frozen=True)
class SpikeAt:
    """The loss of these global batches of the sample order is 3 higher; kills rank 0 where a roll-back has been decided."""

    watched: Watched
    batches: tuple[int, ...]
    kill: bool = False

    def __call__(self, rank: int) -> None:
        self.watched(rank)
        import pretrain.run
        from megatron_qsparse.parallel.zero import ZeroEngine

        at, original, make = itertools.count(), ZeroEngine.train_step, pretrain.run.Trainer

        def trainer(run, engine, batches, state, *args):
            nonlocal at
            at = itertools.count(state.consumed_samples // 8)
            return make(run, engine, batches, state, *args)

        def step(engine, *args):
            import dataclasses

            result = original(engine, *args)
            return dataclasses.replace(result, loss=result.loss + 3 * (next(at) in self.batches))

        mock.patch.object(ZeroEngine, "train_step", step).start()
        mock.patch.object(pretrain.run, "Trainer", trainer).start()
        if self.kill and rank == 0:
            import os
            import signal

            from pretrain import rollback

            decide = rollback.decide

            def dying(*args):
                decide(*args)
                os.kill(os.getpid(), signal.SIGKILL)

            mock.patch.object(rollback, "decide", dying).start()


def _start(folder: Path, shards: Path, action: str, *more: object, batches=tuple(SPIKE), kill: bool = False):
    folder.mkdir(exist_ok=True)
    arguments = ["--data.path", shards, "--output_dir", folder / "run", *ARGUMENTS, "--spike.action", action, *more]
    with training(*arguments, before=SpikeAt(Watched(samples=folder / "samples.jsonl"), batches, kill)) as process:
        output, _ = process.communicate(TIMEOUT_S)
    return process.returncode, output


def _rows(run: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name == "step" or name.startswith("train/")} for row in journal(run)]


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.matrix)])
def test_a_rolled_back_run_leaves_the_samples_out_and_is_the_same_however_it_was_broken(shards, tmp_path, stage, capsys):
    more = ["--zero.stage", stage, "--bitnet.enabled", "true", "--qsparse.keep", 0.5, "--checkpoint.milestone_interval", 6]
    status, output = _start(tmp_path / "whole", shards, "rollback", *more, "--resume", "never")
    assert status == 0, output
    assert "warning: loss spike in steps 14 to 15: loss 9." in output
    assert "roll-back 1 of at most 3: going back to step 10" in output
    assert "rolled back to step 10: samples 80 to 119, up to the end of the loss spike, are left out" in output
    run = tmp_path / "whole" / "run"
    state = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "trainer.json").read_text())["state"]
    assert (state["step"], state["consumed_samples"], state["rollbacks"]) == (STEPS, (STEPS + 5) * 8, 1)
    assert [row["step"] for row in journal(run)] == list(range(STEPS + 1))
    discarded = [json.loads(line) for line in (run / "metrics.discarded.jsonl").read_text().splitlines()]
    assert [row["step"] for row in discarded] == [11, 12, 13, 14, 15] and discarded[-1]["train/spike"] == 2
    assert sorted(path.name for path in (run / "spikes").iterdir()) == ["step_00000014.npz", "step_00000015.npz"]

    # Killed when it was decided, before anything else happened, and started again.
    broken = tmp_path / "broken"
    status, output = _start(broken, shards, "rollback", *more, kill=True)
    assert status == -9 and (broken / "run" / "rollbacks.json").exists(), output
    arguments = [*TINY, "--data.path", shards, "--output_dir", broken / "run", *ARGUMENTS, "--spike.action", "rollback", *more]
    assert plan.main([str(argument) for argument in arguments]) == 0
    planned = capsys.readouterr().out
    assert "goes on after step 10 of 20" in planned and "samples 80 to 119, up to the end of the loss spike, are left out" in planned
    assert (broken / "run" / "checkpoints" / "step_00000012").exists(), "a plan changes nothing"
    status, output = _start(broken, shards, "rollback", *more)
    assert status == 0 and "rolled back to step 10" in output, output
    tags = json.loads((broken / "run" / "run.json").read_text())["tags"]
    assert tags["rollback.1"] == "before the spike from step 14 to step 10, and on with sample 120"
    again = broken / "run"
    assert _rows(again) == _rows(run)
    last = f"step_{STEPS:08d}"
    expected, found = read_tensors(run / "checkpoints" / last), read_tensors(again / "checkpoints" / last)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert json.loads((again / "checkpoints" / last / "trainer.json").read_text())["state"] == state
    assert sorted(path.name for path in (again / "checkpoints").iterdir()) == sorted(path.name for path in (run / "checkpoints").iterdir())
    whole, parts = consumed(tmp_path / "whole" / "samples.jsonl"), consumed(broken / "samples.jsonl")
    # By the position in the sample order, counted in batches: 11 to 15 were seen before, 16 follows on 10.
    assert {number: whole[number] for number in range(16, STEPS + 6)} == {number: parts[number] for number in range(16, STEPS + 6)}


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_spike_is_told_or_the_end(shards, tmp_path, action):
    status, output = _start(tmp_path, shards, action, *notified.NOTIFY)
    # Processes of their own have written them.
    events = sorted(notified.told(tmp_path / "run"), key=lambda event: int(event[3]))
    assert "warning: loss spike in steps 14 to 15: loss 9." in output
    assert f"warning: spike.rollback_steps=4 has no effect with spike.action={action}: nothing is rolled back" in output
    assert journal(tmp_path / "run")[-1]["step"] == (STEPS if action == "warn" else 15)
    if action == "stop":
        assert status == 1 and "Traceback (most" not in output
        assert "and spike.action=stop" in output and "start again with --allow_change optimizer.lr,spike" in output
        assert [event for event, *_ in events] == ["failure"] and "and spike.action=stop" in events[0][-1]
    else:
        run = tmp_path / "run"
        assert status == 0 and "warning: notify" not in output
        assert [event[:4] for event in events] == [["spike", "run", str(run), "15"], ["finish", "run", str(run), str(STEPS)]]
        assert events[0][-1].startswith("loss spike in steps 14 to 15: loss 9.") and events[1][-1] == f"{run}: all {STEPS} steps are done"


def test_a_run_that_spikes_again_and_again_stops_in_words(shards, tmp_path):
    status, output = _start(tmp_path, shards, "rollback", "--spike.max_rollbacks", 1, batches=(13, 14, 18, 19))
    assert status == 1 and "Traceback (most" not in output
    assert (
        "error: loss spike in steps 14 to 15" in output
        and "after 1 roll-backs (spike.max_rollbacks): lower optimizer.lr and raise" in output
    )


def _checkpoint(directory: CheckpointDirectory, step: int, rollbacks: int, kind: str = "step") -> Path:
    partial = directory.begin(step, kind)
    (partial / "trainer.json").write_text(
        json.dumps({"numerics_version": 1, "identity": {}, "state": {"step": step, "rollbacks": rollbacks}, "format_version": 1})
    )
    return directory.publish(partial)


def test_what_a_roll_back_gives_up(tmp_path):
    directory = CheckpointDirectory(tmp_path, keep_last=9)
    entries = [rollback.Entry(number=1, spike_begins=14, checkpoint_step=10, consumed_samples=120)]
    kept = [_checkpoint(directory, 10, 0), _checkpoint(directory, 16, 1), _checkpoint(directory, 6, 0, "milestone")]
    given_up = [_checkpoint(directory, 12, 0), _checkpoint(directory, 12, 0, "milestone")]
    assert rollback.abandoned([], directory) == [] and rollback.abandoned(entries, directory) == given_up
    assert directory.newest(without=given_up) == kept[1]
    # Its removal broken off, it is not taken for one that was replaced and lost its successor.
    given_up[0].rename(tmp_path / f"{given_up[0].name}.given-up.0123{REMOVED}")
    _checkpoint(directory, 18, 1)
    assert not list(tmp_path.glob(f"*{REMOVED}")) and not given_up[0].exists()


def test_the_last_batches_are_kept(shards, tmp_path):
    config = parse([*TINY, "--data.path", str(shards), "--output_dir", str(tmp_path), "--train.global_batch_size", "4"])
    folder = BatchFolder(SimpleNamespace(config=config), "spikes")
    for step in range(1, 14):
        report = StepReport(step, SimpleNamespace(loss=1.0, grad_norm=2.0), 0.1, 0.1)
        assert folder.keep(report, 4 * step).exists()
    assert [path.name for path in sorted(folder.path.iterdir())] == [f"step_{step:08d}.npz" for step in range(4, 14)]
    with np.load(folder.path / "step_00000013.npz") as kept:
        assert kept["sample_ids"].shape == (4,) and kept["tokens"].shape == (4, 33)
    # The run has gone back: an earlier step, and the last batch.
    assert folder.keep(dataclasses.replace(report, step=2), 8).exists() and len(list(folder.path.iterdir())) == 10
    assert not (folder.path / "step_00000004.npz").exists()
    # Other shards by now: told, and nothing half written stays.
    config.data.path = str(tmp_path / "gone")
    assert folder.keep(dataclasses.replace(report, step=14), 0) is None and len(list(folder.path.iterdir())) == 10


def test_the_numbers_go_on_where_the_list_was_lost(tmp_path):
    config = PretrainConfig(output_dir=str(tmp_path), spike=SpikeConfig(action="rollback", rollback_steps=2))
    directory = CheckpointDirectory(tmp_path / "checkpoints", keep_last=9)
    _checkpoint(directory, 10, 2)
    assert rollback.decide(config, directory, RollBack("spike", 14, 120, rollbacks=2)) == "roll-back 3 of at most 3: going back to step 10"
    state, told = rollback.apply(rollback.read(tmp_path), {"step": 10, "consumed_samples": 80, "rollbacks": 2})
    assert state == {"step": 10, "consumed_samples": 120, "rollbacks": 3} and "samples 80 to 119" in told
    assert rollback.apply(rollback.read(tmp_path), state) == (state, "")
    with pytest.raises(ValueError, match="after 3 roll-backs"):
        rollback.decide(config, directory, RollBack("spike", 14, 120, rollbacks=0))
