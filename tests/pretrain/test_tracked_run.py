"""A real training run and a real MLflow server that is killed and started again under it, or that is not there at all."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.tracking.__main__ import main as tracking
from pretrain.tracking.store import connect
from tests.pretrain.holding import Hold
from tests.pretrain.launch import losses, train, training, wait_for_step
from tests.tracking.server import Server

STEPS = 150


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    connect(f"sqlite:///{folder}/server.db").search_experiments()
    server = Server(folder)
    yield server
    server.kill()


def arguments(shards: Path, run: Path, uri: str, steps: int) -> list[object]:
    return [
        *("--data.path", shards, "--output_dir", run, "--train.steps", steps, "--validation.interval", steps // 2),
        *("--qsparse.keep", 0.4, "--bitnet.enabled", "true", "--validation.samples", 16, "--schedule.warmup_steps", 2),
        *("--tracking.enabled", "true", "--tracking.uri", uri, "--tracking.experiment", "tracked", "--tracking.system_metrics", "true"),
        *("--tracking.system_metrics_interval_s", 0.5, "--tracking.drain_timeout_s", 60),
    ]


def test_every_step_is_in_mlflow_once_although_the_server_died_twice(server, shards, tmp_path):
    run, hold = tmp_path / "run", Hold(STEPS - 5, tmp_path / "go on")
    server.start()
    with training(*arguments(shards, run, server.uri, STEPS), "--tracking.drain_timeout_s", 1, before=hold) as process:
        wait_for_step(process, run, 5)
        server.kill()
        wait_for_step(process, run, 25)
        server.start()
        wait_for_step(process, run, STEPS - 5)
        server.kill()
        hold.until.touch()
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    server.start()
    client = connect(server.uri)
    assert "pretrain.tracking sync" in output and tracking(["sync", str(run)]) == 0
    run_id = (run / "run_id").read_text().strip()
    points = {point.step: point.value for point in client.get_metric_history(run_id, "train/loss")}
    assert points == losses(run) and sorted(points) == list(range(1, STEPS + 1))
    assert len(client.get_metric_history(run_id, "train/loss")) == STEPS

    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["qsparse.keep"] == "0.4" and found.data.params["bitnet.enabled"] == "True"
    for metric in (
        "val/loss",
        "sparsity/mlp.down",
        "sparsity/attention.qkv",
        "model/activated_parameters",
        "train/flops",
        "perf/tokens_per_s",
    ):
        assert metric in found.data.metrics
    assert any(name.startswith("system/") for name in found.data.metrics)
    assert 0.59 < found.data.metrics["sparsity/attention.qkv"] < 0.65
    assert [item.path for item in client.list_artifacts(run_id)] == ["config.yaml"]
    [dataset] = found.inputs.dataset_inputs
    assert dataset.dataset.source and dataset.tags[0].value == "training"
    assert len(client.search_runs([found.info.experiment_id])) == 1


def test_a_run_without_a_server_trains_and_is_shipped_later(server, shards, tmp_path):
    run = tmp_path / "run"
    flags = [*arguments(shards, run, server.uri, 6), "--tracking.drain_timeout_s", 1]
    output = train(*flags, processes=1)
    assert sorted(losses(run)) == list(range(1, 7))
    assert "pretrain.tracking sync" in output
    server.start()
    for _ in range(2):
        assert tracking(["sync", str(run)]) == 0
    client = connect(server.uri)
    run_id = (run / "run_id").read_text().strip()
    assert [(p.step, p.value) for p in client.get_metric_history(run_id, "train/loss")] == sorted(losses(run).items())
    assert client.get_run(run_id).info.status == "FINISHED"


@dataclass(frozen=True)
class InTheWay:
    """A file takes the place of the checkpoints' folder when training begins: no save finds it."""

    path: Path

    def __call__(self, rank: int) -> None:
        import pretrain.run

        start = pretrain.run.start_tracking
        pretrain.run.start_tracking = lambda *args: (self.path.write_text("not a directory"), start(*args))[1]


def test_a_failure_during_training_is_failed_in_mlflow(shards, tmp_path):
    run, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    saving = ["--validation.interval", 0, "--checkpoint.interval", 20, "--checkpoint.max_failures", 1]
    with training(*arguments(shards, run, uri, 400), *saving, processes=1, before=InTheWay(run / "checkpoints")) as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "NotADirectoryError" in output
    assert 20 <= max(losses(run)) < 400
    assert connect(uri).get_run((run / "run_id").read_text().strip()).info.status == "FAILED"
