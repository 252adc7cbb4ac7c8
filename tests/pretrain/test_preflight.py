"""Which nodes are named, by what their processes report. On real nodes: tests/slurm/test_preflight.py."""

import json

import pytest

from pretrain.preflight import local
from pretrain.preflight.__main__ import main
from pretrain.preflight.joint import ring
from pretrain.preflight.judge import judge
from pretrain.preflight.reports import Report, read


def report(node: str, local_rank: int = 0, **values) -> Report:
    return Report(**{"node": node, "local_rank": local_rank, "device": "CPU", "tflops": 1.0, "joined": True} | values)


def nodes(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


class TestRing:
    @pytest.mark.parametrize("count", range(1, 10))
    def test_each_neighbours_once_and_nobody_twice_in_a_round(self, count):
        rounds = ring(count)
        pairs = [frozenset(pair) for pairs in rounds for pair in pairs]
        expected = {frozenset((i, (i + 1) % count)) for i in range(count)} if count > 1 else set()
        assert set(pairs) == expected and len(pairs) == len(expected)
        for pairs in rounds:
            members = [node for pair in pairs for node in pair]
            assert len(members) == len(set(members))


class TestJudge:
    def test_all_good(self):
        verdict = judge([report("a"), report("b", tflops=0.9)], ["a", "b"], 1)
        assert verdict.bad == [] and [row[0] for row in verdict.table] == ["node", "a", "b"]

    def test_who_does_not_report(self):
        verdict = judge([report("a", i) for i in range(8)] + [report("b", i) for i in range(7)], ["a", "b", "c"], 8)
        assert verdict.bad == ["b", "c"]
        assert verdict.problems["b"][0].startswith("did not report (processes 7 of 8)")

    def test_a_slow_device_among_several(self):
        found = [report(node, i, tflops=0.4 if (node, i) == ("n2", 1) else 1.0) for node in nodes(4) for i in range(2)]
        assert judge(found, nodes(4), 2).problems == {"n2": ["computes at 0.4 TFLOP/s, 40% of what is usual here (1)"]}

    def test_a_slow_link_is_laid_at_the_node_that_both_neighbours_have_it_with(self):
        speed = {frozenset(("n0", "n1")): 10.0, frozenset(("n1", "n2")): 2.0, frozenset(("n2", "n3")): 2.0, frozenset(("n3", "n0")): 10.0}
        found = [report(n, between_gb_s={o: speed[frozenset((n, o))] for o in nodes(4) if frozenset((n, o)) in speed}) for n in nodes(4)]
        assert judge(found, nodes(4), 1).problems == {"n2": ["reduces at 2 GB/s, 20% of what is usual here (10)"]}

    def test_of_two_nodes_the_better_one_says_what_is_usual_but_a_link_between_them_is_nobodys(self):
        found = [report("a", between_gb_s={"b": 0.1}), report("b", between_gb_s={"a": 0.1}, tflops=0.3)]
        assert judge(found, ["a", "b"], 1).bad == ["b"]

    def test_slow_among_its_own_devices(self):
        found = [report(node, i, inside_gb_s=100.0 if node == "n1" else 400.0) for node in nodes(3) for i in range(2)]
        assert judge(found, nodes(3), 2).problems == {"n1": ["reduces among its own devices at 100 GB/s, 25% of what is usual here (400)"]}

    def test_a_wrong_clock(self):
        found = [report("n0", skew_s=-0.01), report("n1", skew_s=0.0), report("n2", skew_s=90.0)]
        assert judge(found, nodes(3), 1).problems == {"n2": ["its clock is 90.0 s ahead"]}

    def test_no_gpu_where_others_have_one(self):
        found = [report(node, device="CPU" if node == "n1" else "NVIDIA H100") for node in nodes(3)]
        assert judge(found, nodes(3), 1).problems == {"n1": ["has no GPU that torch finds, others have"]}

    def test_what_a_node_says_of_itself(self):
        found = [report("n0"), report("n1", problems=["cannot read the data: gone"])]
        assert judge(found, nodes(2), 1).problems == {"n1": ["cannot read the data: gone"]}


def test_reports_that_are_damaged_are_missing(tmp_path, capsys):
    report("a").write(tmp_path)
    (tmp_path / "b.0.json").write_text("{")
    (tmp_path / "c.0.json").write_text(json.dumps({"format_version": 99}))
    assert [found.node for found in read(tmp_path)] == ["a"]
    assert main(["judge", "--report", str(tmp_path), "--nodes", "a b c", "--processes-per-node", "1"]) == 3
    assert (tmp_path / "bad").read_text() == "b\nc\n"
    assert "bad node: b: did not report (its process)" in capsys.readouterr().out


def test_a_disk_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    found = report("a")
    assert local.check_disk(found, tmp_path / "file" / "run", "run directory") is None
    assert found.problems == [f"cannot write 32 MiB to the run directory {tmp_path / 'file' / 'run'} (Not a directory)"]


def test_a_disk_that_can_leaves_nothing_behind(tmp_path):
    found = report("a")
    assert local.check_disk(found, tmp_path, "run directory") > 0 and found.problems == [] and list(tmp_path.iterdir()) == []


def test_data(shards, tmp_path):
    found = report("a")
    local.check_data(found, shards)
    assert found.problems == []
    local.check_data(found, tmp_path)
    assert len(found.problems) == 1 and found.problems[0].startswith("cannot read the data: ")


def test_a_device_that_computes_wrongly(monkeypatch):
    import torch

    monkeypatch.setattr(local, "COMPUTE_S", 0.01)
    found = report("a", tflops=None)
    local.check_computing(found, "cpu")
    assert found.problems == [] and found.tflops > 0
    matmul = torch.Tensor.__matmul__

    def wrong(a, b):
        product = matmul(a, b)
        if product.shape == (512, 512):
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    local.check_computing(found, "cpu")
    assert found.problems == ["device 0 (CPU) computes 1 of 512 sums wrongly"]
