"""Learning rate and weight decay as pure functions of the step: nothing to save, nothing to resume.

`step` counts from 0. During warm-up the rate is peak * (step + 1) / warmup_steps. Afterwards `progress` goes from 0 at the
first step after the warm-up towards 1 at the end of the run.

two_stage is BitNet's: a linear decay over the whole run, whose peak changes half-way to a second, lower one, with no weight
decay from there on (The Era of 1-bit LLMs: training tips, microsoft/unilm; Q-Sparse app. B).
"""

import math

from pretrain.config import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Rate of update `step` of `steps`."""
    if step < schedule.warmup_steps:
        return optimizer.lr * (step + 1) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    span = optimizer.lr - schedule.min_lr
    match schedule.kind:
        case "cosine":
            return schedule.min_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return schedule.min_lr + span * (1 - progress)
        case "polynomial":
            return schedule.min_lr + span * (1 - progress) ** schedule.power
        case "wsd":
            return optimizer.lr - span * max(0.0, (step - (steps - schedule.decay_steps)) / max(1, schedule.decay_steps))
        case "two_stage":
            return (schedule.second_lr if in_second_stage(step, steps) else optimizer.lr) * (1 - progress)
    raise ValueError(f"schedule.kind={schedule.kind!r}")


def weight_decay(step: int, steps: int, optimizer: OptimizerConfig, schedule: ScheduleConfig) -> float:
    """Weight decay of update `step`: constant, but 0 in the second stage of two_stage."""
    return 0.0 if schedule.kind == "two_stage" and in_second_stage(step, steps) else optimizer.weight_decay


def in_second_stage(step: int, steps: int) -> bool:
    return step >= steps // 2
