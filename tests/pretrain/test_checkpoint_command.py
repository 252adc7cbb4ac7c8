"""`python -m pretrain.checkpoint` on the checkpoints of a real run, and on damaged and foreign directories."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.cli import main
from pretrain.checkpoint.directory import CheckpointDirectory
from tests.pretrain.launch import train


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory) -> tuple[Path, str]:
    """A run of 6 steps with a checkpoint every 2 and a milestone every 3, and what it printed."""
    run = tmp_path_factory.mktemp("run") / "run"
    settings = ["--train.micro_batch_size", 2, "--train.global_batch_size", 8, "--validation.samples", 16, "--qsparse.keep", "0.4"]
    output = train(
        "--data.path", shards, *settings, "--train.steps", 6, "--checkpoint.interval", 2, "--checkpoint.milestone_interval", 3,
        "--output_dir", run,
    )  # fmt: skip
    return run, output


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_run_says_what_it_saved(finished):
    run, output = finished
    for name in ("step_00000002", "step_00000004", "step_00000006 and milestone_00000006", "milestone_00000003"):
        assert f"saved {name}: " in output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "milestone_00000003", "milestone_00000006", "step_00000004", "step_00000006",
    ]  # fmt: skip


def test_list_names_steps_dates_sizes_and_states(run, capsys):
    (run / "checkpoints" / "step_00000007.partial" / "state").mkdir(parents=True)
    (run / "checkpoints" / "step_00000004" / "trainer.json").unlink()
    status, out, _ = call(capsys, "list", run, "--json")
    rows = {(row["kind"], row["step"]): row for row in json.loads(out)}
    assert status == 0 and list(rows) == [("milestone", 3), ("step", 4), ("milestone", 6), ("step", 6), ("step", 7)]
    assert rows["step", 4]["state"] == "damaged: trainer.json is missing" and rows["step", 7]["state"] == "unfinished"
    assert rows["step", 6]["state"] == "complete" and rows["milestone", 6]["size"] < rows["step", 6]["size"] / 3
    assert rows["step", 6]["created"].startswith("20")
    status, out, _ = call(capsys, "list", run / "checkpoints" / "step_00000006")
    assert status == 0 and out.splitlines()[1].split()[:2] == ["6", "step"] and len(out.splitlines()) == 2


def test_verify_reads_every_byte(run, capsys):
    status, out, err = call(capsys, "verify", run)
    assert (status, err) == (0, "") and "every byte of 4 checkpoints" in out
    victim = next((run / "checkpoints" / "milestone_00000003" / "state").glob("*.distcp"))
    flip(victim)
    (run / "checkpoints" / "step_00000004" / "config.yaml").unlink()
    status, out, err = call(capsys, "verify", run / "checkpoints")
    assert status == 1 and len(out.splitlines()) == 2 and "2 of 4 checkpoints are damaged" in err
    assert f"milestone_00000003: state/{victim.name} has other contents" in out and "step_00000004: config.yaml is missing" in out
    assert call(capsys, "verify", run / "checkpoints" / "step_00000006")[0] == 0
    assert call(capsys, "verify", run / "checkpoints" / "milestone_00000003")[0] == 1


def test_show_tells_run_sparsity_layout_and_tensors(run, capsys):
    status, out, _ = call(capsys, "show", run, "--json")
    shown = json.loads(out)
    assert status == 0 and shown["checkpoint"].endswith("step_00000006") and shown["state"]["step"] == 6
    assert shown["layout"] == {"processes": 2, "tensor": 1, "pipeline": 1, "expert": 1, "data": 2, "zero_stage": 1}
    assert shown["kept"]["layers.1.mlp.down"] == {"k": 6, "groups": 8, "width": 128}
    assert shown["identity"]["qsparse.groups"] == 8 and len(shown["identity"]["data.tokenizer"]) == 64 and shown["run_id"] is None
    assert shown["tensors"]["optimizer.exp_avg.decoder.layers.mlp.linear_fc2.weight"] == {"shape": [2, 64, 128], "dtype": "float32"}
    assert shown["tensors"]["decoder.layers.mlp.linear_fc2.weight"]["dtype"] == "bfloat16"
    status, out, _ = call(capsys, "show", run / "checkpoints" / "milestone_00000003")
    assert status == 0 and "6 x 8 of 128" in out and "milestone" in out and "optimizer." not in out
    assert any(line.split() == ["decoder.layers.mlp.linear_fc2.weight", "bfloat16", "2x64x128"] for line in out.splitlines())


def test_show_takes_the_newest_that_is_complete(run, capsys):
    for name in ("step_00000006", "milestone_00000006"):
        (run / "checkpoints" / name / "config.yaml").unlink()
    assert json.loads(call(capsys, "show", run, "--json")[1])["state"]["step"] == 4


def test_prune_keeps_the_last_and_the_milestones(run, capsys):
    directory = CheckpointDirectory(run / "checkpoints", keep_last=1)
    before = sorted(directory.path.iterdir())
    status, out, _ = call(capsys, "prune", run, "--keep-last", 1, "--dry-run")
    assert status == 0 and out.startswith("would remove") and "step_00000004" in out and sorted(directory.path.iterdir()) == before
    status, out, _ = call(capsys, "prune", run, "--keep-last", 1)
    assert out.startswith("removed") and [path.name for path in directory.published()] == ["step_00000006"]
    assert len(directory.published("milestone")) == 2
    assert "nothing to remove" in call(capsys, "prune", run, "--keep-last", 1)[1]
    call(capsys, "prune", run, "--keep-last", 1, "--milestones")
    assert [path.name for path in directory.published("milestone")] == ["milestone_00000006"]


@pytest.mark.parametrize("command", [["verify"], ["list"], ["show"], ["prune", "--keep-last", "1"]])
def test_a_directory_without_checkpoints_is_an_error_in_words(command, tmp_path, capsys):
    for path, reason in ((tmp_path / "nowhere", "is no directory"), (tmp_path, "holds no checkpoints")):
        status, _, err = call(capsys, command[0], path, *command[1:])
        assert status == 2 and reason in err and "run directory" in err


def test_prune_never_removes_everything(run, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prune", str(run), "--keep-last", "0"])
    assert caught.value.code == 2 and "always kept" in capsys.readouterr().err


def test_a_newer_trainer_json_is_refused(run, capsys):
    path = run / "checkpoints" / "step_00000006" / "trainer.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 9'))
    status, _, err = call(capsys, "show", run / "checkpoints" / "step_00000006")
    assert status == 2 and "written by a newer version" in err and "format 9" in err
