"""Learning rate and weight decay: values at the edges, continuity, and BitNet's two stages."""

import math
from itertools import pairwise

import pytest

from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.schedules import in_second_stage, learning_rate, weight_decay

PEAK, LOW, STEPS, WARMUP = 1e-3, 1e-4, 100, 10
OPTIMIZER = OptimizerConfig(lr=PEAK, weight_decay=0.1)
SCHEDULES = {
    "cosine": ScheduleConfig(kind="cosine", warmup_steps=WARMUP, min_lr=LOW),
    "linear": ScheduleConfig(kind="linear", warmup_steps=WARMUP, min_lr=LOW),
    "polynomial": ScheduleConfig(kind="polynomial", warmup_steps=WARMUP, min_lr=LOW, power=2.0),
    "wsd": ScheduleConfig(kind="wsd", warmup_steps=WARMUP, min_lr=LOW, decay_steps=20),
    "two_stage": ScheduleConfig(kind="two_stage", warmup_steps=WARMUP, second_lr=PEAK / 2),
}


def _rates(schedule: ScheduleConfig, steps: int = STEPS) -> list[float]:
    return [learning_rate(step, steps, OPTIMIZER, schedule) for step in range(steps)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_rises_evenly_from_the_first_share_to_the_peak(kind):
    rates = _rates(SCHEDULES[kind])
    assert rates[:WARMUP] == pytest.approx([PEAK * (step + 1) / WARMUP for step in range(WARMUP)])
    assert rates[WARMUP - 1] == rates[WARMUP] == pytest.approx(PEAK) == max(rates)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_peak(kind):
    schedule = ScheduleConfig(**{**vars(SCHEDULES[kind]), "warmup_steps": 0})
    assert learning_rate(0, STEPS, OPTIMIZER, schedule) == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "wsd"])
def test_the_end_of_the_run_is_the_lowest_rate(kind):
    """`min_lr` is reached where the run ends; the last update is one step before."""
    schedule, rates = SCHEDULES[kind], _rates(SCHEDULES[kind])
    assert learning_rate(STEPS, STEPS, OPTIMIZER, schedule) == pytest.approx(LOW)
    assert LOW < rates[-1] == min(rates[WARMUP:])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", LOW + (PEAK - LOW) * (1 + math.cos(math.pi / 3)) / 2),
        ("linear", LOW + (PEAK - LOW) * 2 / 3),
        ("polynomial", LOW + (PEAK - LOW) * 4 / 9),
        ("wsd", PEAK),
        ("two_stage", PEAK * 2 / 3),
    ],
)
def test_a_third_of_the_decay(kind, expected):
    assert learning_rate(40, STEPS, OPTIMIZER, SCHEDULES[kind]) == pytest.approx(expected)


def test_half_of_a_cosine_is_the_middle():
    assert learning_rate(55, STEPS, OPTIMIZER, SCHEDULES["cosine"]) == pytest.approx((PEAK + LOW) / 2)


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "wsd"])
def test_rates_fall_without_jumps(kind):
    rates = _rates(SCHEDULES[kind])
    falls = [before - after for before, after in pairwise(rates[WARMUP:])]
    assert all(fall >= 0 for fall in falls)
    # The steepest is the parabola's start: twice the even pace of 90 steps; wsd falls within 20 steps.
    steepest = (PEAK - LOW) / 20 if kind == "wsd" else 2 * (PEAK - LOW) / 90
    assert max(falls) <= steepest * (1 + 1e-9)


def test_wsd_is_constant_until_the_last_decay_steps():
    rates = _rates(SCHEDULES["wsd"])
    assert set(rates[WARMUP:81]) == {PEAK}
    assert rates[81] == pytest.approx(PEAK - (PEAK - LOW) / 20)
    assert rates[90] == pytest.approx((PEAK + LOW) / 2)


def test_a_polynomial_of_power_one_is_linear():
    polynomial = ScheduleConfig(kind="polynomial", warmup_steps=WARMUP, min_lr=LOW, power=1.0)
    assert _rates(polynomial) == pytest.approx(_rates(SCHEDULES["linear"]))


def test_two_stages_change_peak_and_weight_decay_at_the_half_and_nowhere_else():
    schedule, rates = SCHEDULES["two_stage"], _rates(SCHEDULES["two_stage"])
    assert rates[49] == pytest.approx(PEAK * (1 - 39 / 90))
    assert rates[50] == pytest.approx(PEAK / 2 * (1 - 40 / 90))
    # Both stages lie on a line that ends at 0 with the run, each at its own peak.
    assert [rate / (1 - (step - WARMUP) / 90) for step, rate in enumerate(rates)][WARMUP:50] == pytest.approx([PEAK] * 40)
    assert [rate / (1 - (step - WARMUP) / 90) for step, rate in enumerate(rates)][50:] == pytest.approx([PEAK / 2] * 50)
    assert learning_rate(STEPS, STEPS, OPTIMIZER, schedule) == 0
    assert [weight_decay(step, STEPS, OPTIMIZER, schedule) for step in (0, 49, 50, 99)] == [0.1, 0.1, 0.0, 0.0]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_second_stage_is_the_larger_half_of_an_odd_run(steps):
    assert [in_second_stage(step, steps) for step in range(steps)] == [step >= steps // 2 for step in range(steps)]
    assert sum(in_second_stage(step, steps) for step in range(steps)) == math.ceil(steps / 2)


@pytest.mark.parametrize("kind", ["cosine", "linear", "polynomial", "wsd"])
def test_weight_decay_is_constant_in_one_stage(kind):
    assert {weight_decay(step, STEPS, OPTIMIZER, SCHEDULES[kind]) for step in range(STEPS)} == {0.1}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_short_runs_have_rates_within_the_range(kind, steps):
    """A run of one step, and one that is all warm-up."""
    schedule = ScheduleConfig(**{**vars(SCHEDULES[kind]), "warmup_steps": min(steps, WARMUP), "decay_steps": 0})
    assert all(0 < rate <= PEAK * (1 + 1e-9) for rate in _rates(schedule, steps))


def test_an_unknown_kind_is_an_error():
    with pytest.raises(ValueError, match="schedule.kind='step'"):
        learning_rate(5, 10, OPTIMIZER, ScheduleConfig(kind="step"))
