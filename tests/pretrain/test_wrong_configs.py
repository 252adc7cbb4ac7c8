"""No wrong configuration starts: each is refused in words that name the setting and what to do, before torch is even imported.

The wrong ones are generated from the fields of the dataclasses (wrong.py) and from the rules (combinations.py); test_right_configs.py
shows that not more is refused than must be.
"""

import copy
import json
import math
import re
import subprocess
import sys
from functools import reduce

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.config import parse
from pretrain.validate import examine
from pretrain.validation.ranges import RANGES
from tests.pretrain import wrong
from tests.pretrain.combinations import COMBINATIONS
from tests.pretrain.wrong import LEAVES, Case

REMEDY = re.compile(
    r"\b(must|is needed|needs a value|choose|use|set|lower|raise|leave|name|write|remove|did you mean|shorten|change|add|start|copy|move)\b"
    r"|\b(check|correct|upgrade|give|create|run)\b|--help"
)
INTERNALS = re.compile(r"Traceback|<class|typing\.|NoneType|object at 0x|jsonargparse|Parser key")


def check(case: Case, told: str) -> None:
    assert told, f"accepted: {case}"
    assert not INTERNALS.search(told) and "escaped" not in told, f"{case}: {told}"
    for line in told.splitlines():
        assert REMEDY.search(line), f"{case}: no remedy in {line!r}"
        assert len(line) < 600, line
    for name in case.named:
        assert name in told, f"{case}: {name} is not named in {told!r}"


def test_every_wrong_value_of_every_field_is_refused_without_torch(shards, tmp_path):
    cases = wrong.single_cases()
    command = [sys.executable, "-m", "tests.pretrain.wrong", str(shards), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["imported"] == []
    assert len(cases) == len(found["told"]) >= 200
    wrong_answers = []
    for (case, _), told in zip(cases, found["told"], strict=True):
        try:
            check(case, told)
        except AssertionError as error:
            wrong_answers.append(str(error).splitlines()[0])
    assert not wrong_answers, "\n".join(wrong_answers)


def test_random_wrong_configurations_are_refused(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    wrong.prepare(folder)
    seen = set()

    @settings(max_examples=260, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of(wrong.any_single(), *(rule() for rule in COMBINATIONS)), in_file=st.booleans())
    def refused(case: Case, in_file: bool) -> None:
        # A flag is text whatever it looks like, and holds no NUL.
        in_file = in_file or any(LEAVES.get(name) is str or "\0" in str(value) for name, value in case.changes.items())
        check(case, wrong.outcome(case, str(shards), folder, in_file))
        seen.add(repr(case))

    refused()
    assert len(seen) >= 200


@pytest.mark.parametrize("rule", COMBINATIONS, ids=lambda rule: rule.__name__)
def test_settings_that_do_not_go_together_are_refused(rule, shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    wrong.prepare(folder)

    @settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=rule())
    def refused(case: Case) -> None:
        check(case, wrong.outcome(case, str(shards), folder, in_file=False))

    refused()


def test_numbers_that_no_parser_has_seen_are_refused_too(shards):
    """A configuration can be made in Python."""
    base = parse([f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in wrong.base(str(shards)).items()])
    for name, allowed in RANGES.items():
        values = [allowed.high * 10, -1, *([math.nan, math.inf, -math.inf] if isinstance(allowed.high, float) else [])]
        for value in values:
            config = copy.deepcopy(base)
            *section, field = name.split(".")
            setattr(reduce(getattr, section, config), field, value)
            problems, _, _ = examine(config, 1)
            assert any(problem.startswith(f"{name}={value} ") for problem in problems), f"{name}={value}: {problems}"


def test_a_field_without_a_range_is_asked_for(monkeypatch):
    monkeypatch.setitem(wrong.LEAVES, "train.new", int)
    with pytest.raises(AssertionError, match="train.new: give it a range"):
        wrong.single_cases()
