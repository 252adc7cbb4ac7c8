"""The mistakes people make, and what they are told; nothing is started and nothing already written is lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from pretrain import launcher
from pretrain.config import ConfigurationError, parse
from tests.pretrain.launch import TINY, fail, train_command


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
    # Neither is a name cut short; a hyphen, a missing section and a missing value are told as what they are.
    arguments = ["--train.step", "5", "--train.log-interval", "1", "--lr", "1", "steps=5", "--optimizer.lr"]
    assert refused(run("pretrain.plan", *arguments)).splitlines() == [
        "error: no setting train.step; did you mean train.steps? (--help lists all)",
        "error: no setting train.log-interval; did you mean train.log_interval? (--help lists all)",
        "error: no setting lr; did you mean optimizer.lr? (--help lists all)",
        "error: steps=5 belongs to no setting: write --section.name VALUE",
        "error: optimizer.lr needs a value: --optimizer.lr VALUE",
    ]


WRITTEN = {
    "misspelt": ("qsparse:\n  kep: 0.4\ntrian: {}\n", ["line 2: no setting qsparse.kep; did you mean qsparse.keep?",
                                                      "line 3: no setting trian; did you mean train?"]),
    "of another type": ("train:\n  steps: abc\n  precision: fp16\n", ["line 2: train.steps=abc: an integer is needed",
                                                                    "line 3: train.precision=fp16: choose one of bf16, fp32"]),
    "twice": ("train:\n  steps: 5\n  seed: 1\n  steps: 6\n", ["line 4: train.steps is written twice, in lines 2 and 4: remove one"]),
    "two sections": ("train:\n  steps: 5\ndata: {}\ntrain:\n  seed: 1\n", ["line 4: train is written twice, in lines 1 and 4: remove one"]),
    "no mapping": ("- a\n- b\n", ["line 1: the file must hold a mapping of settings, such as `model: {preset: ...}`; found a list"]),
    "nothing under a section": ("train:\n", ["line 1: train must be a mapping of settings, such as `{steps: ...}`; found nothing"]),
    "not closed": ("train:\n  steps: [3\n", ["line 3: this is no YAML: while parsing a flow sequence, expected ',' or ']'"]),
    "a tab": ("train:\n\tsteps: 3\n", ["line 2: this is no YAML: while scanning for the next token, found character"]),
    "a NUL": ("train: \0\n", ["this is no YAML file that can be read: unacceptable character #x0000"]),
    "two documents": ("train: {}\n---\ndata: {}\n", ["line 2: this is no YAML: expected a single document"]),
    "empty": ("", ["the file is empty: write settings into it, or leave it out"]),
    "itself": ("train: &a\n  <<: *a\n", ["line 2: train is merged into itself: remove the line"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_mistakes_in_a_file_are_told_with_their_line(name, tmp_path):
    text, expected = WRITTEN[name]
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        parse(["--config", str(config)])
    for line in str(caught.value).splitlines():
        assert line.startswith(str(config)) and any(part in line for part in expected), line


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "latin").write_bytes("train: {steps: 3} # \u00e4".encode("latin-1"))
    for path, told in (
        (tmp_path / "nowhere.yaml", "there is no such file"),
        (tmp_path, "this is a directory: name a YAML file"),
        (tmp_path / ("x" * 300), "there is no such file"),
        ("/dev/null", "this is no plain file"),
        (tmp_path / "latin", "this is no YAML file that can be read: 'utf-8' codec"),
    ):
        message = refused(run("pretrain.train", "--config", path))
        assert message.startswith(f"error: {path}: {told}") and len(message.splitlines()) == 1


def test_sections_from_files_of_their_own_are_checked_as_well(tmp_path):
    (tmp_path / "train.yaml").write_text("steps: 7\n")
    (tmp_path / "run.yaml").write_text("train: train.yaml\noptimizer: &o {lr: 1e-3}\n")
    assert parse(["--config", str(tmp_path / "run.yaml")]).train.steps == 7
    (tmp_path / "train.yaml").write_text("stepz: 7\n")
    with pytest.raises(ConfigurationError, match=r"train.yaml, line 1: no setting train.stepz; did you mean train.steps\?"):
        parse(["--config", str(tmp_path / "run.yaml")])


def test_flags_win_over_files_wherever_they_stand(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train:\n  steps: 1\n  seed: 1\n  log_interval: 1\n")
    second.write_text("train:\n  steps: 2\n  seed: 2\n")
    flag, files = ["--train.steps", "3"], ["--config", str(first), f"--config={second}"]
    for arguments in ([*flag, *files], [*files, *flag], [*files[:2], *flag, *files[2:]]):
        train = parse(arguments).train
        assert (train.steps, train.seed, train.log_interval) == (3, 2, 1)
    assert parse([*files, "--train.steps=3", "--train.steps", "4"]).train.steps == 4
    assert parse(["--optimizer.lr", "-1e-3"]).optimizer.lr == -1e-3, "a value may begin with a minus sign"


def test_elements_and_names_can_be_added_by_flags():
    config = parse(["--tracking.tags.team", "a", "--tracking.tags.of", "b c", "--qsparse.recipe+", "{match: '*.down', keep: 0.5}"])
    assert config.tracking.tags == {"team": "a", "of": "b c"} and config.qsparse.recipe[0].keep == 0.5


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
    output = fail("--train.stepz", 3)
    assert output == "error: no setting train.stepz; did you mean train.steps? (--help lists all)\n"


def test_a_launcher_that_says_nonsense(monkeypatch, shards):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    launcher.check()
    for name, value, told in (
        ("WORLD_SIZE", "0", "WORLD_SIZE=0 in the environment is no number of processes"),
        ("LOCAL_RANK", "x", "LOCAL_RANK=x in the environment must be whole numbers"),
        ("RANK", "2", "RANK=2 in the environment is not below WORLD_SIZE=2"),
    ):
        with monkeypatch.context() as changed, pytest.raises(ConfigurationError, match=f"{told}.*torchrun"):
            changed.setenv(name, value)
            launcher.check()
    message = refused(run("pretrain.train", *TINY, "--data.path", shards, WORLD_SIZE="two"))
    assert message.startswith("error: WORLD_SIZE=two in the environment is no number of processes") and len(message.splitlines()) == 1


@pytest.mark.parametrize("size", [0, -4])
def test_a_plan_for_no_processes(size, shards):
    result = run("pretrain.plan", *TINY, "--data.path", shards, "--world_size", size)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"problem: world_size={size}: the number of processes must be at least 1" in result.stdout


def test_started_without_torchrun(shards, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    command = [sys.executable, "-m", "pretrain.train", *TINY, "--data.path", str(shards), "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "torchrun" in refused(result) and "Traceback" not in result.stderr
    # Told at once: neither torch nor a launcher is asked.
    code = (
        "import sys; sys.argv = sys.argv[1:]; from pretrain.train import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{code}; sys.exit(code)", *command[2:]], capture_output=True, text=True, env=environment
    )
    assert "torchrun" in refused(result)


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
    from pretrain.config import dump_yaml

    config = parse([*TINY, "--qsparse.recipe", json.dumps([{"match": "layers.0.*", "keep": 1.0}]), "--tracking.tags", '{"a": "b"}'])
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_yaml(config))
    assert parse(["--config", str(saved)]) == config
