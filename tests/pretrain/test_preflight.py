"""Which nodes are named, by their reports. Nodes at work: test_preflight_nodes.py."""

import pytest

from pretrain.preflight.cli import main
from pretrain.preflight.health import Reading, kind_of, problems
from pretrain.preflight.judge import BAD, Limits, judge
from pretrain.preflight.meeting import rounds, skews
from pretrain.preflight.report import Report, path_of


def _report(node: str, **values) -> Report:
    return Report(**{"node": node, "start": "", "timeout_s": 60.0, "done": True, "doing": "ended", "members": ["a", "b", "c"], **values})


def _judged(reports: list[Report], limits: Limits | None = None, missing: dict[str, str] | None = None) -> dict[str, list[str]]:
    nodes = sorted([report.node for report in reports] + list(missing or {}))
    return judge({report.node: report for report in reports}, missing or {}, nodes, limits or Limits(), 60.0)


def test_a_clock_is_held_against_the_median_one():
    assert skews({"a": 0.0, "b": 7.0, "c": 0.2}) == {"a": -0.2, "b": 6.8, "c": 0.0}
    assert _judged([_report("a", clock_s=0.0), _report("b", clock_s=7.0), _report("c", clock_s=0.2)]) == {
        "b": ["clock is 6.8 s ahead of the median of the nodes: see to time synchronization"]
    }
    assert _judged([_report("a", clock_s=0.0), _report("b", clock_s=4.0)]) == {}
    both = _judged([_report("a", clock_s=0.0), _report("b", clock_s=-9.0)])
    assert set(both) == {"a", "b"} and "clocks of a and b are 9.0 s apart, nothing tells which is wrong" in both["a"][0]


def test_a_slow_link_is_blamed_on_the_node_that_is_slow_with_everybody():
    three = [_report("a", pairs={"b": 1.0, "c": 10.0}), _report("b", pairs={"a": 1.0, "c": 1.1}), _report("c", pairs={"b": 1.1, "a": 9.9})]
    assert _judged(three) == {"b": ["all-reduce with a, c is slow: 1.1 GB/s, the median of the nodes is 10"]}
    broken = [
        _report("a", pairs={"b": 0.0, "c": 8.0}, failures={"b": "x"}),
        _report("b", pairs={"a": 0.0, "c": 0.0}, failures={"a": "timed out"}),
        _report("c", pairs={"b": 0.0, "a": 8.0}, failures={"b": "x"}),
    ]
    assert _judged(broken) == {"b": ["all-reduce with a, c failed (timed out)"]}


def test_with_two_nodes_what_each_does_alone_decides_and_else_both_are_named():
    def two(speed: float, **of_b) -> list[Report]:
        why = {} if speed else {"failures": {"b": "timed out"}}
        return [
            _report("a", pairs={"b": speed}, tflops={"GPU 0": 9.0}, **why),
            _report("b", pairs={"a": speed}, **{"tflops": {"GPU 0": 9.0}, **of_b}),
        ]

    assert _judged(two(1.0)) == {}, "nothing to compare with"
    both = _judged(two(1.0), Limits(min_gbps=5.0))
    text = "the all-reduce between a and b is slow: 1 GB/s, 5 are needed; nothing tells which of the two is at fault"
    assert both == {"a": [text], "b": [text]}
    assert set(_judged(two(1.0, tflops={"GPU 0": 2.0}), Limits(min_gbps=5.0))) == {"b"}
    assert _judged(two(0.0))["a"] == ["the all-reduce between a and b failed (timed out); nothing tells which of the two is at fault"]
    assert set(_judged(two(0.0, problems=["GPU 3 failed: x"]))) == {"b"}


def test_who_is_at_fault_where_the_others_are_not_met():
    gone = {"unreached": "cannot reach a at a:1 (x)", "members": []}
    assert set(_judged([_report("b", **gone), _report("c", **gone)], missing={"a": "did not report"})) == {"a"}
    assert set(_judged([_report("a", done=False, doing="importing torch"), _report("b", **gone)])) == {"a"}
    assert set(_judged([_report("a"), _report("b"), _report("c", **gone)])) == {"c"}
    assert _judged([_report("a"), _report("b", **gone), _report("c", **gone)]) == {"a": ["no other node met it: cannot reach a at a:1 (x)"]}
    assert set(_judged([_report("a", unreached="cannot listen at port 1 (in use)"), _report("b", **gone)])) == {"a"}
    assert _judged([_report("a"), _report("b", done=False, doing="importing torch")])["b"] == [
        "did not end within 60 s: last heard of importing torch"
    ]


def test_a_slow_device_and_another_manifest_are_named():
    even = {f"GPU {index}": 600.0 for index in range(4)}
    uneven = _report("b", tflops=even | {"GPU 2": 200.0}, manifest="x" * 64)
    others = _report("a", tflops=even, manifest="x" * 64), _report("c", tflops=even, manifest="y" * 64)
    found = _judged([uneven, *others])
    assert found == {
        "b": ["GPU 2 computes slowly: 200 TFLOP/s, the median of all is 600"],
        "c": ["sees other shards than the others: its manifest is yyyyyyyyyyyy, not xxxxxxxxxxxx"],
    }


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 31, 32])
def test_every_node_is_paired_with_several_others(size):
    nodes = [f"n{i}" for i in range(size)]
    turns = rounds(nodes)
    partners = {node: set() for node in nodes}
    for pairs in turns:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy)), "one pair at a time"
        for first, second in pairs:
            partners[first].add(second)
            partners[second].add(first)
    assert all(len(others) >= min(2, size - 1) for others in partners.values()) and len(turns) <= 4
    assert rounds(["a"]) == []


def test_what_the_driver_says_of_a_gpu():
    assert (
        problems(0, Reading()) == problems(0, Reading(uncorrected_errors=0, remap_pending=False, slowdown=False, foreign_bytes=2**20)) == []
    )
    bad = Reading(uncorrected_errors=2, remap_pending=True, slowdown=True, temperature=91, foreign_bytes=3 << 30)
    told = problems(5, bad)
    assert len(told) == 4 and all(line.startswith("GPU 5 ") for line in told) and "at 91 degrees" in told[2]
    assert len(problems(5, Reading(remap_pending=True, remap_failed=True))) == 1


def test_reports_that_are_damaged_old_or_of_another_job_are_none(tmp_path, monkeypatch, capsys):
    names = ["a", "b", "c", "d", "e"]
    for node in names[:4]:
        _report(node).write(tmp_path)
    path_of(tmp_path, "b").write_text(path_of(tmp_path, "b").read_text()[:50])
    path_of(tmp_path, "c").write_text('{"format_version": 2}')
    _report("a", problems="x").write(tmp_path)
    monkeypatch.setattr("pretrain.preflight.judge.GRACE_S", 0.1)
    assert main(["judge", "--report", str(tmp_path), "--nodes", " ".join(names), "--timeout", "30"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"bad node: a: left a report that cannot be read, {tmp_path}/a.json (its field problems is no list)")
    assert lines[1].startswith(f"bad node: b: left a report that cannot be read, {tmp_path}/b.json (") and lines[2].endswith(
        "c.json (it has another format)"
    )
    assert lines[3] == "bad node: e: did not report within 60 s" and (tmp_path / BAD).read_text() == "a\nb\nc\ne\n"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert main(["judge", "--report", str(tmp_path), "--nodes", "d"]) == 3, "what another job has left behind is no report of this one"


COMPLETE = "node --report . --nodes n1 --node n1 --address a --port 1 --devices 1 --run-directory ."


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "required"),
        (COMPLETE.replace("--nodes n1", "--nodes n2"), "--node n1 is none of --nodes n2"),
        (COMPLETE.replace("--port 1", "--port 70000"), "'70000' must be a port from 1 to 65535"),
        (COMPLETE.replace("--devices 1", "--devices 0"), "'0' must be a whole number from 1 to 64"),
        (COMPLETE + " --timeout 3", "3 must be from 15 to 86400 seconds"),
        (COMPLETE + " --free-bytes 1e9", "'1e9' must be a whole number of bytes"),
        ("judge --report no/such --nodes n1", "--report no/such is no directory: make it where all nodes see it"),
        ("judge --report . --nodes n1/x", "'n1/x' is no name of a node"),
        ("judge --report . --nodes n1 --fraction 2", "2 must be between 0.01 and 0.99"),
        ("judge --report . --nodes n1 --fraction nan", "nan must be between 0.01 and 0.99"),
    ],
)
def test_bad_input_ends_with_a_word_about_it(arguments, told, capsys):
    try:
        status = main(arguments.split())
    except SystemExit as error:
        status = error.code
    assert status == 2 and told in capsys.readouterr().err


def test_a_node_without_a_driver_among_those_with_one_is_named():
    three = [_report("a", device="NVIDIA H100"), _report("b", device="CPU"), _report("c", device="NVIDIA H100")]
    assert _judged(three) == {"b": ["has no NVIDIA driver, other nodes have: see nvidia-smi there"]}
    assert _judged([_report("a", device="CPU"), _report("b", device="CPU")]) == {}
    assert kind_of("auto") in ("cpu", "cuda") and kind_of("cpu") == "cpu" and kind_of("cuda") == "cuda"
