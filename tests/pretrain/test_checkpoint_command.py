"""`python -m pretrain.checkpoint` on the checkpoints of a real run, and on damaged and foreign directories."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from pretrain.checkpoint import files
from pretrain.checkpoint.cli import main
from pretrain.checkpoint.directory import CheckpointDirectory
from tests.pretrain.launch import started, train
from tests.pretrain.test_checkpoints import flip


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
    assert [step for (kind, step), row in rows.items() if row["resume_point"]] == [6] and rows["step", 6]["kind"] == "step"
    assert [line.split()[0] for line in call(capsys, "list", run)[1].splitlines() if line.endswith("a run goes on from here")] == ["6"]
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
    assert status == 1 and len(out.splitlines()) == 2
    assert "2 of 4 checkpoints damaged: of these training would go on from step_00000006" in err
    assert f"milestone_00000003: state/{victim.name} has other contents" in out and "step_00000004: config.yaml is missing" in out
    assert call(capsys, "verify", run / "checkpoints" / "step_00000006")[0] == 0
    status, _, err = call(capsys, "verify", run / "checkpoints" / "milestone_00000003")
    assert status == 1 and "1 of 1 checkpoint damaged: training could go on from none of these" in err


def test_a_checkpoint_is_known_from_inside(run, capsys, monkeypatch):
    monkeypatch.chdir(run / "checkpoints" / "step_00000006")
    assert "every byte of 1 checkpoint " in call(capsys, "verify", ".")[1]
    assert [row["name"] for row in json.loads(call(capsys, "list", ".", "--json")[1])] == ["step_00000006"]
    assert json.loads(call(capsys, "show", ".", "--json")[1])["state"]["step"] == 6


def test_what_a_run_at_work_removes_meanwhile_is_passed_over(run, capsys, monkeypatch):
    """The run removes step 4 as soon as one of its files is read."""
    victim = run / "checkpoints" / "step_00000004"
    hashed = files.sha256

    def read_and_remove(path, *arguments):
        digest = hashed(path, *arguments)
        if victim in path.parents:
            shutil.rmtree(victim, ignore_errors=True)
        return digest

    monkeypatch.setattr(files, "sha256", read_and_remove)
    status, out, err = call(capsys, "verify", run)
    assert status == 0 and "every byte of 3 checkpoints" in out and f"{victim} was removed meanwhile" in err


def test_list_while_checkpoints_come_and_go(run, capsys):
    """A process publishes and prunes as fast as it can."""
    script = (
        "import sys; from pathlib import Path; from pretrain.checkpoint.directory import CheckpointDirectory\n"
        "directory = CheckpointDirectory(Path(sys.argv[1]), keep_last=1)\n"
        "for step in range(100, 10**6):\n"
        "    partial = directory.begin(step); (partial / 'state' / 'x').write_text('x'); directory.publish(partial)"
    )
    with started([sys.executable, "-c", script, str(run / "checkpoints")]):
        seen = set()
        while len(seen) < 20:
            status, out, err = call(capsys, "list", run, "--json")
            assert status == 0, err
            seen |= {row["step"] for row in json.loads(out)}


def test_show_tells_run_sparsity_layout_and_tensors(run, capsys):
    status, out, _ = call(capsys, "show", run, "--json")
    shown = json.loads(out)
    assert status == 0 and shown["checkpoint"].endswith("step_00000006") and shown["state"]["step"] == 6
    assert shown["layout"] == {
        "processes": 2, "tensor": 1, "pipeline": 1, "expert": 1, "data": 2, "zero_stage": 1, "virtual_pipeline": 1, "sequence": False,
        "recompute": False,
    }  # fmt: skip
    assert shown["kept"]["layers.1.mlp.down"] == {"k": 6, "groups": 8, "width": 128}
    assert shown["identity"]["qsparse.groups"] == 8 and len(shown["identity"]["data.tokenizer"]) == 64 and shown["run_id"] is None
    assert shown["tensors"]["optimizer.exp_avg.decoder.layers.mlp.linear_fc2.weight"] == {"shape": [2, 64, 128], "dtype": "float32"}
    assert shown["tensors"]["decoder.layers.mlp.linear_fc2.weight"]["dtype"] == "bfloat16"
    status, out, _ = call(capsys, "show", run / "checkpoints" / "milestone_00000003")
    assert status == 0 and "6 x 8 of 128" in out and "milestone" in out and "optimizer." not in out
    assert "none: tracking.enabled=false" in out
    assert any(line.split() == ["decoder.layers.mlp.linear_fc2.weight", "bfloat16", "2x64x128"] for line in out.splitlines())


def test_show_takes_the_newest_that_is_complete(run, capsys):
    for name in ("step_00000006", "milestone_00000006"):
        (run / "checkpoints" / name / "config.yaml").unlink()
    status, out, err = call(capsys, "show", run, "--json")
    assert status == 0 and json.loads(out)["state"]["step"] == 4
    assert "step_00000006 is damaged (config.yaml is missing)" in err and "milestone_00000006 is damaged" in err


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


def test_prune_of_one_checkpoint(run, capsys):
    checkpoints = run / "checkpoints"
    newest, older, milestone = (checkpoints / name for name in ("step_00000006", "step_00000004", "milestone_00000003"))
    status, out, _ = call(capsys, "prune", milestone, "--dry-run")
    assert status == 0 and out.startswith("would remove") and milestone.is_dir()
    assert call(capsys, "prune", milestone)[0] == 0 and not milestone.exists()
    status, _, err = call(capsys, "prune", newest, "--keep-last", 1)
    assert status == 2 and "leave out --keep-last" in err
    status, _, err = call(capsys, "prune", run)
    assert status == 2 and "--keep-last N is missing" in err
    victim = next((older / "state").glob("*.distcp"))
    flip(victim)
    status, _, err = call(capsys, "prune", newest)
    assert status == 2 and f"{older} would be what a run goes on from and is damaged" in err and newest.is_dir()
    victim.write_bytes(b"cut")
    status, _, err = call(capsys, "prune", newest)
    assert status == 2 and "is the only complete checkpoint of its run" in err
    assert call(capsys, "prune", older)[0] == 0 and sorted(p.name for p in checkpoints.iterdir()) == ["milestone_00000006", newest.name]


def test_a_run_that_is_called_like_a_checkpoint_is_none(run, capsys):
    for name in ("milestone_2", "step_00000004"):
        twin = run.parent / name
        shutil.copytree(run, twin)
        status, _, err = call(capsys, "prune", twin)
        assert status == 2 and "--keep-last N is missing" in err and (twin / "metrics.jsonl").exists()
        assert len(call(capsys, "list", twin)[1].splitlines()) == 5, "a head and all of them"


def test_the_last_one_stays_where_it_is_only_newer_than_this_version(run, capsys):
    checkpoints = run / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000004")
    path = checkpoints / "step_00000006" / "files.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 9'))
    status, _, err = call(capsys, "prune", path.parent)
    assert status == 2 and "format 9 is newer" in err and "nothing was removed" in err and path.exists()


def test_what_is_no_list_of_files_is_named_with_the_remedy(run, capsys):
    for name, harm in {"step_00000004": Path.unlink, "step_00000006": lambda path: path.write_text("{")}.items():
        harm(run / "checkpoints" / name / "files.json")
    status, out, _ = call(capsys, "verify", run)
    assert status == 1 and "step_00000004: files.json: No such file or directory. This list of a checkpoint's files" in out
    assert "step_00000006: files.json: JSONDecodeError: " in out and out.count("restore it from a copy, or move the checkpoint away") == 2


def test_prune_removes_nothing_where_what_would_stay_is_damaged(run, capsys):
    """A flipped byte, which no size tells, must not cost the good ones."""
    flip(next((run / "checkpoints" / "step_00000006" / "state").glob("*.distcp")))
    before = sorted((run / "checkpoints").iterdir())
    for dry in ([], ["--dry-run"]):
        status, _, err = call(capsys, "prune", run, "--keep-last", 1, *dry)
        assert status == 2 and "step_00000006 would stay and is damaged" in err and "nothing was removed" in err
        assert sorted((run / "checkpoints").iterdir()) == before
    assert "nothing to remove" in call(capsys, "prune", run, "--keep-last", 2)[1]


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
