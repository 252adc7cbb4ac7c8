"""The sharded state of a ZeroEngine: weights, fp32 master weights, both Adam moments and the step count.

Written with Megatron's dist_checkpointing, so that every tensor carries its place in the global one and can be read back at
another tensor-, pipeline- or data-parallel size. ZeRO's flat partitions never reach the disk: each parameter's state is
gathered through DeepSpeed's public accessors and stored beside the parameter, under its name.
"""

from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor

from megatron_qsparse.compat import deepspeed
from megatron_qsparse.parallel.zero import ZeroEngine

FORMAT_VERSION = 1
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(engine: ZeroEngine, directory: Path) -> None:
    """Write the state into an existing empty directory. Collective: every rank must call it."""
    state = _sharded_state(engine, filled=True)
    state["common"] = {"format_version": FORMAT_VERSION, "adam_step": _adam_step(engine)}
    dist_checkpointing.save(state, str(directory))


def load(engine: ZeroEngine, directory: Path) -> None:
    """Read a state written at any layout into the engine. Collective.

    Raises ValueError where the format is newer than this code.
    """
    # Read first: a newer format may hold other tensors.
    common = dist_checkpointing.load_common_state_dict(str(directory))["common"]
    if common["format_version"] > FORMAT_VERSION:
        raise ValueError(f"{directory}: format {common['format_version']} is newer than {FORMAT_VERSION}, the newest this version reads")
    loaded = dist_checkpointing.load(_sharded_state(engine, filled=False), str(directory))
    _create_adam_state(engine, common["adam_step"])
    utils, optimizer = deepspeed.load().utils, loaded["optimizer"]
    with torch.no_grad():
        for name, param in engine.model.named_parameters():
            param.data.copy_(loaded["model"][name])
            master, *moments = (optimizer[f"{kind}.{name}"].view(param.shape).to(param.device) for kind in ("fp32", *_MOMENTS))
            utils.safe_set_full_fp32_param(param, master)
            for moment, value in zip(_MOMENTS, moments, strict=True):
                utils.safe_set_full_optimizer_state(param, value, moment)
    engine.weights_changed()


def _sharded_state(engine: ZeroEngine, filled: bool) -> dict:
    """Weights and optimizer tensors with their global places; `filled` with values, or empty buffers to load into."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = engine.model.sharded_state_dict(metadata=metadata)
    named = dict(engine.model.named_parameters())
    places = get_param_id_to_sharded_param_map(weights, named.values())
    optimizer = {}
    if filled:
        _create_adam_state(engine, _adam_step(engine))
    for index, (name, param) in enumerate(named.items()):
        for kind in ("fp32", *_MOMENTS):
            value = _full_state(param, kind) if filled else torch.empty(param.shape, dtype=torch.float32)
            optimizer[f"{kind}.{name}"] = make_sharded_optimizer_tensor(places[index], value, f"optimizer.{kind}")
    return {"model": weights, "optimizer": optimizer}


def _full_state(param: torch.nn.Parameter, kind: str) -> torch.Tensor:
    utils = deepspeed.load().utils
    full = utils.safe_get_full_fp32_param(param) if kind == "fp32" else utils.safe_get_full_optimizer_state(param, kind)
    return full.detach().clone().view(param.shape)


def _adam_step(engine: ZeroEngine) -> int:
    """Updates done so far; the same for every parameter."""
    states = engine.optimizer.optimizer.state.values()
    return next((int(state["step"]) for state in states if "step" in state), 0)


def _create_adam_state(engine: ZeroEngine, step: int) -> None:
    """Give ZeRO's flat partitions their moments, which torch creates at the first update only, and set the step count."""
    zero = engine.optimizer
    for group in zero.optimizer.param_groups:
        for flat in group["params"]:
            state = zero.optimizer.state[flat]
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=flat.device)
            for moment in _MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(flat)
    # Stages 1 and 2 link the moments of all parameter groups after stepping the first one, when the others have none yet
    # (stage_1_and_2.py _optimizer_step, DeepSpeed 0.19.8): link again, now that all exist.
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
