"""What a job decides without Slurm: how many nodes train, whether there is a further start, what the account says."""

import dataclasses
import json

import pytest

from pretrain.config import PretrainConfig, parse
from pretrain.job import attempts, decide, outcome
from pretrain.job.attempts import Attempt
from pretrain.job.fit import fit


def config(*flags: object) -> PretrainConfig:
    return parse([str(flag) for flag in flags])


class TestFit:
    @pytest.mark.parametrize(
        ("nodes", "per_node", "flags", "expected"),
        [
            (4, 8, ("--train.global_batch_size", 256), 4),
            (3, 8, ("--train.global_batch_size", 256), 2),
            (7, 8, ("--train.global_batch_size", 1024), 4),
            (3, 1, ("--train.global_batch_size", 24), 3),
            # Tensor and pipeline parallelism stay: three data-parallel ranks of 8 do not divide 16, two do.
            (3, 8, ("--train.global_batch_size", 16, "--parallel.tensor", 4, "--parallel.pipeline", 2), 2),
            # Micro-batches of 4 on 16 ranks are 64 samples at once.
            (4, 8, ("--train.global_batch_size", 64, "--train.micro_batch_size", 4), 2),
            # Nothing divides: all, and validation says why.
            (3, 8, ("--train.global_batch_size", 6), 3),
        ],
    )
    def test_the_most_nodes_that_divide_the_batch(self, nodes, per_node, flags, expected):
        found = fit(config(*flags), nodes, per_node)
        assert (found.nodes, found.processes) == (expected, expected * per_node)

    def test_experts_are_spread_over_the_ranks_there_are(self):
        found = fit(config("--model.num_experts", 8, "--parallel.expert", 8, "--train.global_batch_size", 12), 3, 4)
        # 12 ranks divide the batch, but not the experts' 8; 8 ranks the experts, not the batch; 4 neither: as it is.
        assert found.nodes == 3
        found = fit(config("--model.num_experts", 8, "--parallel.expert", 4, "--train.global_batch_size", 8), 3, 4)
        assert (found.nodes, found.data_parallel) == (2, 8)


def attempt(**values) -> Attempt:
    return Attempt(**{"job": "1", "restart": 0, "chain": "1", "began": 0.0, "step": 0} | values)


class TestStartsWithoutProgress:
    def test_only_those_at_the_same_step_count(self):
        history = [attempt(step=0), attempt(step=3), attempt(step=3)]
        assert decide.starts_without_progress(history, "1", 3) == 2
        assert decide.starts_without_progress(history, "1", 6) == 0

    def test_those_of_other_submissions_do_not(self):
        assert decide.starts_without_progress([attempt(chain="0"), attempt(chain="0"), attempt()], "1", 0) == 1
        assert decide.starts_without_progress([attempt(), attempt(chain="0"), attempt()], "1", 0) == 2

    def test_preemption_does_not(self):
        assert decide.starts_without_progress([attempt(preempted=True)] * 5 + [attempt()], "1", 0) == 1

    def test_a_start_with_the_mark_that_never_ended_was_preempted(self, tmp_path):
        attempts.begin(tmp_path, attempt(job="7"))
        assert not attempts.read(tmp_path)[0].preempted
        (tmp_path / attempts.FOLDER / "7.0").mkdir()
        (tmp_path / attempts.FOLDER / "7.0" / attempts.PREEMPTED_NAME).touch()
        assert attempts.read(tmp_path)[0].preempted
        attempts.end(tmp_path, attempt(job="7", ended=1.0, outcome="again"))
        assert not attempts.read(tmp_path)[0].preempted

    def test_the_bound(self):
        assert decide.give_up(2, 3, 7) is None
        assert "the newest complete one is of step 7" in decide.give_up(3, 3, 7)
        assert "there is none yet" in decide.give_up(3, 3, 0)


class TestAfter:
    def after(self, tmp_path, status=1, signalled="", said=None, history=(), preempted=False):
        return decide.after(config("--output_dir", tmp_path), status, signalled, said, [*history, attempt()], "1", 3, "", preempted)

    def test_goes_on(self, tmp_path):
        assert self.after(tmp_path).kind == "again"
        assert self.after(tmp_path, status=0, signalled="USR1").kind == "again"

    def test_a_process_that_cannot_go_on_ends_it(self, tmp_path):
        found = self.after(tmp_path, said=outcome.Outcome(2, "this and that"))
        assert (found.kind, found.reason) == ("failed", "this and that")

    def test_too_many_starts_end_it_but_not_while_it_is_preempted(self, tmp_path):
        history = [attempt(), attempt()]
        assert self.after(tmp_path, history=history).kind == "failed"
        assert self.after(tmp_path, status=0, signalled="USR1", history=history).kind == "failed"
        # At the time limit, or for a node that is lost each time.
        assert self.after(tmp_path, signalled="TERM", history=history).kind == "failed"
        assert self.after(tmp_path, signalled="TERM", history=history, preempted=True).kind == "again"

    def test_the_switch(self, tmp_path):
        (tmp_path / "STOP").touch()
        found = self.after(tmp_path, status=0)
        assert found.kind == "stopped" and str(tmp_path / "STOP") in found.reason


class TestAccount:
    def test_is_read_as_it_was_written(self, tmp_path):
        first = attempt(nodes=["a", "b"], devices=16, processes=8, began=1.5)
        attempts.begin(tmp_path, first)
        attempts.end(tmp_path, dataclasses.replace(first, ended=9.0, ended_step=3, outcome="again", reason="why", preempted=True))
        attempts.begin(tmp_path, attempt(restart=1))
        found = attempts.read(tmp_path)
        assert found[0] == dataclasses.replace(first, ended=9.0, ended_step=3, outcome="again", reason="why", preempted=True)
        assert (found[1].restart, found[1].ended) == (1, None)

    def test_an_end_belongs_to_its_start(self, tmp_path):
        """A second submission is refused while the first trains, and neither takes the other's place."""
        attempts.begin(tmp_path, attempt(job="7"))
        attempts.begin(tmp_path, attempt(job="8"))
        attempts.end(tmp_path, attempt(job="7", ended=1.0, ended_step=3, outcome="again"))
        attempts.end(tmp_path, attempt(job="9", ended=2.0, outcome="failed"))
        assert [(found.job, found.ended) for found in attempts.read(tmp_path)] == [("7", 1.0), ("8", None)]

    def test_survives_a_line_that_a_kill_cut_short(self, tmp_path):
        attempts.begin(tmp_path, attempt())
        with attempts.path(tmp_path).open("a") as file:
            file.write('{"format_version": 1, "event": "en')
        attempts.begin(tmp_path, attempt(restart=1))
        assert [found.restart for found in attempts.read(tmp_path)] == [0, 1]

    def test_nothing_there(self, tmp_path):
        assert attempts.read(tmp_path) == []


class TestOutcome:
    def test_the_first_word_counts(self, tmp_path, monkeypatch):
        path = tmp_path / "start" / "outcome.json"
        monkeypatch.setenv(outcome.VARIABLE, str(path))
        outcome.write(2, "first")
        outcome.write(1, "second")
        assert outcome.read(path) == outcome.Outcome(2, "first")

    def test_nobody_asked(self, monkeypatch):
        monkeypatch.delenv(outcome.VARIABLE, raising=False)
        outcome.write(2, "no job reads this")

    @pytest.mark.parametrize("content", [None, "", "[]", json.dumps({"status": "x"})])
    def test_nothing_to_read(self, tmp_path, content):
        if content is not None:
            (tmp_path / "outcome.json").write_text(content)
        assert outcome.read(tmp_path / "outcome.json") is None
