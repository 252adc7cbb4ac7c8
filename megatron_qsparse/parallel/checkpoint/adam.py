"""Adam's state inside ZeRO's optimizers: the step count, and moments that torch creates at the first update only."""

import torch

from megatron_qsparse.parallel.zero import ZeroEngine

MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_step(engine: ZeroEngine) -> int:
    """Updates done so far; the same for every parameter."""
    states = engine.optimizer.optimizer.state.values()
    return next((int(state["step"]) for state in states if "step" in state), 0)


def create_adam_state(engine: ZeroEngine, step: int) -> None:
    """Give ZeRO's flat partitions their moments where they have none, and all of them this step count.

    Each gets its own tensor for the count: torch's Adam advances it in place.
    """
    zero = engine.optimizer
    for flat in engine.master_shards():
        state = zero.optimizer.state[flat]
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=flat.device)
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(flat)
    if engine.stage < 3:
        # Stages 1 and 2 link the moments of all parameter groups after stepping the first one, when the others have none yet
        # (stage_1_and_2.py _optimizer_step, DeepSpeed 0.19.8): link again, now that all exist.
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
