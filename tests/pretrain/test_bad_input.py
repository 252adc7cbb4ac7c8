"""The mistakes people make, and what they are told; nothing is started and nothing already written is lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.pretrain.launch import TINY, train_command


def run(*command: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *(str(part) for part in command)], capture_output=True, text=True, timeout=120, env=os.environ | environment
    )


def refused(result: subprocess.CompletedProcess) -> str:
    """The message of a command that refused, without any traceback of ours."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_misspelt_key_on_the_command_line(shards):
    message = refused(run("pretrain.train", *TINY, "--data.path", shards, "--qsparse.kep", "0.4"))
    assert message == "error: no setting qsparse.kep; did you mean qsparse.keep? (--help lists all)\n"


def test_a_misspelt_key_in_a_file(shards, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("qsparse:\n  kep: 0.4\n")
    message = refused(run("pretrain.train", "--config", config, "--data.path", shards))
    assert "kep" in message and "qsparse" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.global_batch_size", 6, "--train.micro_batch_size", 4], ["train.global_batch_size=6", "train.micro_batch_size=4"]),
        (["--qsparse.keep", 0], ["qsparse.keep=0", "(0, 1]"]),
        (["--qsparse.keep", 0.4, "--qsparse.groups", 7], ["qsparse.groups=7", "does not divide", "attention.proj"]),
        (["--model.vocab_size", 64], ["model.vocab_size=64", "smaller than the tokenizer's 512"]),
        (["--model.preset", "7bb"], ["model.preset='7bb'", "did you mean '7b'"]),
        (["--zero.stage", 0], ["zero.stage=0", "use 1, 2 or 3"]),
        (["--parallel.tensor", 2], ["1 processes", "parallel.tensor=2", "start a multiple of 2"]),
        (["--parallel.expert", 2], ["parallel.expert=2", "model.num_experts=0"]),
        (["--tracking.uri", "./mlruns"], ["./mlruns", "sqlite"]),
    ],
)
def test_settings_that_cannot_work(shards, tmp_path, arguments, expected):
    output = tmp_path / "run"
    message = refused(run("pretrain.train", *TINY, "--data.path", shards, "--output_dir", output, "--tracking.enabled", "true", *arguments))
    for part in expected:
        assert part in message
    assert not output.exists()


def test_all_problems_are_told_at_once_and_plan_tells_the_same(shards):
    arguments = [*TINY, "--data.path", shards, "--train.steps", 0, "--train.global_batch_size", 3, "--train.micro_batch_size", 2]
    told = [line.removeprefix("error: ") for line in refused(run("pretrain.train", *arguments)).splitlines()]
    planned = run("pretrain.plan", *arguments)
    assert planned.returncode == 2
    assert [line.removeprefix("problem: ") for line in planned.stdout.splitlines() if line.startswith("problem: ")] == told
    assert len(told) == 2


def test_no_shards_where_the_path_points(tmp_path):
    message = refused(run("pretrain.train", *TINY, "--data.path", tmp_path / "nowhere"))
    assert "nowhere" in message and "data_tools tokenize" in message


def test_a_missing_and_a_cut_shard(shards, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    shard = next(copy.glob("train-*.tar"))
    with shard.open("rb+") as file:
        file.truncate(shard.stat().st_size // 2)
    message = refused(run("pretrain.train", *TINY, "--data.path", copy))
    assert shard.name in message and "data_tools verify" in message
    shard.unlink()
    assert shard.name in refused(run("pretrain.train", *TINY, "--data.path", copy))


def test_a_wrong_start_is_explained_once_by_torchrun_processes(shards, tmp_path):
    command = train_command("--data.path", shards, "--train.global_batch_size", 3, "--output_dir", tmp_path / "run")
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert result.stderr.count("error: train.global_batch_size=3 is not a multiple of") == 1


def test_started_without_torchrun(shards, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-m", "pretrain.train", *TINY, "--data.path", str(shards), "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "torchrun" in refused(result) and "Traceback" not in result.stderr


def test_a_device_that_is_not_there(shards, tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    rendezvous = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = run("pretrain.train", *TINY, "--data.path", shards, "--output_dir", tmp_path / "run", "--device", "cuda", **rendezvous)
    assert "no CUDA device" in refused(result)


@pytest.mark.parametrize(
    "module",
    [
        "pretrain.train",
        "pretrain.plan",
        "pretrain.compare",
        "pretrain.tracking",
        "pretrain.checkpoint",
        "pretrain.checkpoint.benchmark",
        "data_tools",
    ],
)
def test_help_is_quick_and_imports_no_torch(module):
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_module({module!r}, run_name='__main__')\n"
    code += "except SystemExit as end: assert end.code == 0\nassert 'torch' not in sys.modules and 'mlflow' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_plan_prints_what_the_run_would_be(shards):
    milestones = ["--train.steps", 10, "--checkpoint.milestone_interval", 3]
    result = run("pretrain.plan", *TINY, "--data.path", shards, "--qsparse.keep", 0.4, "--world_size", 2, *milestones)
    assert result.returncode == 0, result.stderr
    for part in ("147,776", "keeps 26 x 1 of 64", "keeps 3 x 8 of 64", "keeps 6 x 8 of 128", "GiB", "tokens", "no problems found"):
        assert part in result.stdout
    assert "3 of 0.000 GiB" in result.stdout


def test_a_saved_configuration_is_read_back(shards, tmp_path):
    from pretrain.config import dump_yaml, parse

    config = parse([*TINY, "--qsparse.recipe", json.dumps([{"match": "layers.0.*", "keep": 1.0}]), "--tracking.tags", '{"a": "b"}'])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(config))
    assert parse(["--config", str(saved)]) == config
