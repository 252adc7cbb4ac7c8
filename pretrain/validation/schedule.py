"""Settings of the learning rate that contradict each other or the length of the run."""

from pretrain.config import PretrainConfig


def problems(config: PretrainConfig) -> list[str]:
    schedule, steps, found = config.schedule, config.train.steps, []
    if schedule.warmup_steps > steps:
        found.append(f"schedule.warmup_steps={schedule.warmup_steps} is longer than the run, train.steps={steps}: shorten it")
    if schedule.min_lr > config.optimizer.lr >= 0:
        found.append(f"schedule.min_lr={schedule.min_lr} is above optimizer.lr={config.optimizer.lr}: lower it")
    uses = {
        "power": ("polynomial",),
        "decay_steps": ("wsd",),
        "second_lr": ("two_stage",),
        "min_lr": ("cosine", "linear", "polynomial", "wsd"),
    }
    defaults = type(schedule)()
    for name, kinds in uses.items():
        value = getattr(schedule, name)
        if value != getattr(defaults, name) and schedule.kind not in kinds:
            found.append(f"schedule.{name}={value} has no effect with schedule.kind={schedule.kind}: leave it out, since it belongs to "
                         f"{' and '.join(kinds)}")  # fmt: skip
    if schedule.kind == "wsd" and not 0 < schedule.decay_steps <= steps:
        found.append(f"schedule.decay_steps={schedule.decay_steps} must lie in 1 .. train.steps={steps} with schedule.kind=wsd")
    if schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        found.append(f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_steps={schedule.decay_steps} overlap in "
                     f"train.steps={steps}: shorten one of them")  # fmt: skip
    if schedule.kind == "two_stage" and schedule.warmup_steps > steps // 2:
        found.append(f"schedule.warmup_steps={schedule.warmup_steps} reaches into the second stage, which begins at step {steps // 2}: "
                     "shorten it")  # fmt: skip
    if schedule.kind == "two_stage" and not 0 < schedule.second_lr <= config.optimizer.lr:
        found.append(
            f"schedule.second_lr={schedule.second_lr} must lie in (0, optimizer.lr={config.optimizer.lr}] with schedule.kind=two_stage"
        )
    return found
