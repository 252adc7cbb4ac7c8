"""Roll-backs that the checkpoints kept do not reach."""

import math

from pretrain.config import PretrainConfig


def problems(config: PretrainConfig) -> list[str]:
    """For numbers that lie within their ranges."""
    spike, saved = config.spike, config.checkpoint
    if spike.action != "rollback":
        return []
    if saved.interval < 1:
        return ["spike.action=rollback needs checkpoints to go back to: set checkpoint.interval"]
    # At a step that finds a spike the oldest checkpoint kept lies at least keep_last - 1 intervals back.
    back = reach(config)
    needed = 1 + math.ceil(back / saved.interval)
    if saved.keep_last >= needed:
        return []
    return [f"checkpoint.keep_last={saved.keep_last} of checkpoint.interval={saved.interval} steps does not reach the {back} steps back "
            f"that spike.rollback_steps and spike.patience ask for: set checkpoint.keep_last={needed}"]  # fmt: skip


def reach(config: PretrainConfig) -> int:
    """Steps between the end of a spike and the checkpoint that is gone back to; 0 without roll-backs."""
    return config.spike.rollback_steps + config.spike.patience if config.spike.action == "rollback" else 0


def warnings(config: PretrainConfig) -> list[str]:
    """What works, and not as its user may believe."""
    spike, defaults = config.spike, type(config.spike)()
    given = [name for name in ("rollback_steps", "max_rollbacks") if getattr(spike, name) != getattr(defaults, name)]
    if spike.action in ("rollback", "off"):
        return []
    return [f"spike.{name}={getattr(spike, name)} has no effect with spike.action={spike.action}: nothing is rolled back" for name in given]
