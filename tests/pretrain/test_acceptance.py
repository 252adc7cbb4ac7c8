"""What acceptance runs, and that it finds what does not fit. On real nodes: tests/slurm/test_acceptance.py."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from pretrain.acceptance.__main__ import main
from pretrain.acceptance.cases import LAST, LAYOUTS, Case, cases
from pretrain.acceptance.compare import EQUAL, compare, losses
from pretrain.acceptance.report import Result, write
from pretrain.checkpoint import tensors
from pretrain.config import parse
from pretrain.tracking.journal import Journal
from pretrain.validate import examine

STATE = {
    "optimizer.fp32.a": torch.tensor([1.0, -2.0]),
    "optimizer.exp_avg.a": torch.tensor([0.1, 0.2]),
    "decoder.a": torch.tensor([1.0, -2.0]),
}
CASE = Case(name="layout", kind="layout", variant="dense", precision="fp32", processes=2, reference="reference", begins=("reference", 3))


class TestCases:
    @pytest.mark.parametrize("processes", [2, 4, 8, 16])
    def test_each_begins_and_is_compared_with_one_that_was_run_before(self, processes):
        found, left_out = cases(processes)
        names = [case.name for case in found]
        assert len(set(names)) == len(names)
        for number, case in enumerate(found):
            assert case.processes <= processes
            assert not case.reference or case.reference in names[:number]
            assert case.begins is None or case.begins[0] in names[:number]
        assert not left_out or processes < 8

    @pytest.mark.parametrize("processes", [2, 8])
    def test_all_could_start(self, processes, shards, capsys):
        assert main(["cases", "--nodes", "2", "--processes-per-node", str(processes // 2)]) == 0
        for line in capsys.readouterr().out.splitlines():
            name, _, _, nodes, per_node, *flags = line.split("\t")
            config = parse([*flags, "--data.path", str(shards), "--output_dir", "x", "--data.sequence_length", "32"])
            problems, _, _ = examine(config, int(nodes) * int(per_node))
            assert problems == [], name

    @pytest.mark.parametrize(("nodes", "per_node"), [(4, 1), (3, 2), (3, 3), (1, 8), (32, 8)])
    def test_no_node_gets_more_processes_than_it_has(self, nodes, per_node, capsys):
        assert main(["cases", "--nodes", str(nodes), "--processes-per-node", str(per_node)]) == 0
        out = capsys.readouterr()
        found = [line.split("\t") for line in out.out.splitlines()]
        assert found and all(int(fields[3]) <= nodes and int(fields[4]) <= per_node for fields in found)
        assert ("8 processes cannot be spread evenly over 3 nodes of 3" in out.err) == ((nodes, per_node) == (3, 3))

    def test_every_layout_is_there_with_enough_processes(self):
        names = " ".join(case.name for case in cases(8)[0])
        assert all(layout.name in names for layout in LAYOUTS)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs that are the same; what is in a checkpoint is told by the dictionary `states`."""
    states = {}
    for name in ("reference", "layout"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        journal = Journal(folder / "metrics.jsonl")
        for step in range(1, LAST + 1):
            journal.append(step, {"train/loss": 6.0 / step, "train/grad_norm": 2.0})
            states[name, step] = {key: value.clone() for key, value in STATE.items()}
        journal.close()
    monkeypatch.setattr(tensors, "read_tensors", lambda path: states[path.parts[-3], int(path.name.removeprefix("step_"))])
    return tmp_path, states


def misfits(folder) -> list[str]:
    return [figure.what for figure in compare(CASE, folder) if not figure.fits]


class TestCompare:
    def test_the_same(self, runs):
        assert misfits(runs[0]) == [] and [figure.what for figure in compare(CASE, runs[0])] == list(EQUAL)

    def test_a_loss_that_is_off(self, runs):
        folder, _ = runs
        path = folder / "runs" / "layout" / "metrics.jsonl"
        path.write_text(path.read_text().replace("1.5", "1.50001"))
        assert misfits(folder) == ["loss, nat"]

    def test_a_weight_that_is_off(self, runs):
        folder, states = runs
        states["layout", 4]["optimizer.fp32.a"][1] += 1e-4
        assert misfits(folder) == ["weights, of the largest of each"]

    def test_a_gradient_that_is_off(self, runs):
        folder, states = runs
        states["layout", 4]["optimizer.exp_avg.a"][0] *= 1.001
        assert misfits(folder) == ["gradients, of the largest of each"]

    def test_a_number_that_is_none(self, runs):
        folder, states = runs
        states["layout", 4]["optimizer.fp32.a"][0] = float("nan")
        assert misfits(folder) == ["weights, of the largest of each"]

    def test_a_number_that_is_none_among_others(self, runs):
        folder, states = runs
        for name in ("reference", "layout"):
            for step in (3, 4):
                states[name, step]["optimizer.fp32.b"] = torch.ones(2)
                states[name, step]["optimizer.exp_avg.b"] = torch.ones(2)
        states["layout", 4]["optimizer.fp32.b"][1] = float("nan")
        assert misfits(folder) == ["weights, of the largest of each"]
        states["layout", 4]["optimizer.exp_avg.b"][1] = float("nan")
        dense = replace(CASE, near="rounded")
        assert [figure.what for figure in compare(dense, folder) if not figure.fits] == ["gradients, one minus the cosine"]

    @pytest.mark.parametrize(("name", "what"), [("fp32", "weights"), ("exp_avg", "moments"), ("exp_avg_sq", "moments")])
    @pytest.mark.parametrize("value", [1.01, float("nan")])
    def test_what_resharding_must_not_lose(self, runs, name, what, value):
        folder, states = runs
        case = replace(CASE, kind="reshard", begins=("reference", LAST - 1))
        for run in ("reference", "layout"):
            states[run, LAST]["optimizer.exp_avg_sq.a"] = torch.tensor([0.3, 0.4])
        assert [figure.fits for figure in compare(case, folder)] == [True] * 3
        states["layout", LAST][f"optimizer.{name}.a"][1] = value
        assert [figure.what.partition(",")[0] for figure in compare(case, folder) if not figure.fits] == [what]

    def test_a_loss_that_is_none_behind_one_that_is(self, runs):
        folder, states = runs
        for run in ("reference", "layout"):
            states[run, LAST]["optimizer.exp_avg_sq.a"] = torch.tensor([0.3, 0.4])
        path = folder / "runs" / "layout" / "metrics.jsonl"
        path.write_text(path.read_text().replace('"train/loss": 1.2', '"train/loss": NaN'))
        case = replace(CASE, kind="reshard", begins=("reference", 2))
        assert [figure.what for figure in compare(case, folder) if not figure.fits] == ["loss of each step, nat"]

    def test_a_tensor_too_few(self, runs):
        folder, states = runs
        del states["layout", 4]["optimizer.fp32.a"]
        with pytest.raises(ValueError, match="other tensors than in the reference"):
            compare(CASE, folder)

    def test_a_run_that_did_not_come_to_its_end(self, runs):
        folder, _ = runs
        path = folder / "runs" / "layout" / "metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        with pytest.raises(ValueError, match="ended at step 4"):
            losses(folder / "runs" / "layout", "train/loss")


class TestOnceMore:
    """All layouts of one process more than a reference's, each with the reference's own numbers."""

    @pytest.fixture
    def ran(self, runs, capsys):
        folder, states = runs
        for case in cases(2)[0]:
            copy = folder / "runs" / case.run
            if not copy.exists():
                shutil.copytree(folder / "runs" / "reference", copy)
            for step in range(1, LAST + 1):
                states[case.run, step] = {key: value.clone() for key, value in STATE.items()}
            self._ended(folder, case.name)
        return folder, states

    def _ended(self, folder, name: str, status: int = 0) -> None:
        (folder / "logs" / name).mkdir(parents=True)
        (folder / "logs" / name / "status").write_text(str(status))

    def _listed(self, folder, capsys) -> list[list[str]]:
        assert main(["cases", "--nodes", "2", "--processes-per-node", "1", "--once-more", str(folder)]) == 0
        return [line.split("\t") for line in capsys.readouterr().out.splitlines()]

    def test_what_fits_is_not_taken_again(self, ran, capsys):
        assert self._listed(ran[0], capsys) == []

    @pytest.mark.parametrize(("off", "expected"), [(1.01, ["moe_qsparse fp32, expert 2, once more"]), (-1.0, [])])
    def test_what_a_tipped_entry_explains_is(self, ran, capsys, off, expected):
        folder, states = ran
        for name in ("moe_qsparse fp32, expert 2", "dense bf16, tensor 2"):
            states[name, 4]["optimizer.exp_avg.a"][0] *= off
        assert [fields[0] for fields in self._listed(folder, capsys)] == expected

    @pytest.mark.parametrize("fits", [True, False])
    def test_and_decides(self, ran, capsys, fits):
        folder, states = ran
        name = "moe_qsparse fp32, expert 2"
        states[name, 4]["optimizer.exp_avg.a"][0] *= 1.01
        more = f"{name}, once more"
        shutil.copytree(folder / "runs" / name, folder / "runs" / more)
        self._ended(folder, more)
        for step in range(1, LAST + 1):
            states[more, step] = {key: value.clone() for key, value in STATE.items()}
        if not fits:
            states[more, 5]["optimizer.exp_avg.a"][0] *= 1.01
        size = ["--nodes", "2", "--processes-per-node", "1"]
        (folder / "runs" / "moe_qsparse fp32" / "checkpoints" / "step_00000004").mkdir(parents=True)
        assert main(["prepare", str(folder), more, *size]) == 0 and (folder / "runs" / more / "checkpoints" / "step_00000004").is_dir()
        main(["report", str(folder), *size])
        found = {case["name"]: case["fits"] for case in json.loads((folder / "report.json").read_text())["cases"]}
        assert found[more] == fits and name not in found
        assert f"| {more} (gradients, of the largest of each: " in (folder / "report.md").read_text()


def test_a_kill_before_any_checkpoint_proves_nothing(tmp_path, capsys):
    (tmp_path / "runs" / "killed" / "checkpoints").mkdir(parents=True)
    assert main(["prepare", str(tmp_path), "killed and started again", "--nodes", "1", "--processes-per-node", "2"]) == 1
    assert "needs a checkpoint from before the kill; the newest complete one is of step 0" in capsys.readouterr().err


def test_the_report_says_what_does_not_fit(runs, tmp_path):
    folder, states = runs
    about = {"devices": "d", "nodes": "2", "communication": "gloo", "versions": "v", "date": "2026-01-01"}
    good = Result("good", 2, compare(CASE, folder))
    text = write(tmp_path, about, [good], [("other", "needs 8 processes, there are 2")])
    assert (
        "**All 1 cases fit.**" in text
        and "- other: needs 8 processes" in text
        and "`| d, gloo | 2 | acceptance | v | 2026-01-01 |`" in text
    )
    states["layout", 4]["optimizer.fp32.a"][1] += 1
    text = write(tmp_path, about, [good, Result("bad", 2, compare(CASE, folder)), Result("lost", 2, problem="was not run")], [])
    assert "**2 of 3 cases do not fit:** bad; lost" in text and "acceptance, failed" in text
    assert [case["fits"] for case in json.loads((tmp_path / "report.json").read_text())["cases"]] == [True, False, False]


def test_a_report_of_nothing_fails(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--nodes", "1", "--processes-per-node", "2"]) == 1
    assert "missing: it was not run" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
