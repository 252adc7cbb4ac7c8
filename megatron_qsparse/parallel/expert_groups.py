"""Experts under DeepSpeed: which ranks reduce, shard and count the parameters that not all data-parallel ranks hold.

Megatron marks them with `allreduce=False`, as DeepSpeed does its own experts'. DeepSpeed then wants a name of their group on
each parameter, the process groups under that name, optimizer groups of their own, and a module of its class MoE in the model,
without which it takes no notice. On one expert-parallel rank experts are ordinary parameters and nothing is done.

What follows in DeepSpeed 0.19.8: gradients are summed over the expert-data-parallel ranks (those that hold the same experts)
and divided by the size of the whole data-parallel group, as the loss is a mean over it; optimizer states are sharded over the
expert-data-parallel ranks; the norm sums squares over expert-parallel, tensor-parallel and pipeline ranks.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_qsparse.compat import deepspeed
from megatron_qsparse.layers.moe import expert_parameters


def register_experts(model: torch.nn.Module) -> None:
    """Prepare a model for deepspeed.initialize; Megatron's groups must exist. A no-op on one expert-parallel rank."""
    experts = expert_parameters(model)
    if not experts:
        return
    # DeepSpeed reads the size out of this name.
    name = f"ep_size_{parallel_state.get_expert_model_parallel_world_size()}"
    for param in experts:
        param.group_name = name
    model.expert_groups = _marker(name, model.config.num_moe_experts)


def optimizer_groups(params: list[torch.nn.Parameter]) -> list[dict]:
    """These parameters as optimizer groups, with the keys by which DeepSpeed knows experts; without empty groups."""
    dense = [param for param in params if not hasattr(param, "group_name")]
    experts = [param for param in params if hasattr(param, "group_name")]
    groups = [{"params": dense}]
    if experts:
        groups.append({"params": experts, "name": experts[0].group_name, "moe": True})
    return [group for group in groups if group["params"]]


def _marker(name: str, num_experts: int) -> torch.nn.Module:
    """A module without parameters that is a deepspeed.moe.layer.MoE."""
    deepspeed.load()
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class ExpertGroups(MoE):
        def __init__(self):
            # MoE's own constructor would build experts.
            torch.nn.Module.__init__(self)
            self.num_experts, self.expert_group_name = num_experts, name

        def set_deepspeed_parallelism(self, *_):
            """DeepSpeed calls this for its groups; they are Megatron's. Those of an earlier layout in this process go."""
            expert, expert_data = parallel_state.get_expert_model_parallel_group(), parallel_state.get_expert_data_parallel_group()
            tables = {
                "_EXPERT_PARALLEL_GROUP": expert, "_EXPERT_PARALLEL_GROUP_RANKS": dist.get_process_group_ranks(expert),
                "_EXPERT_DATA_PARALLEL_GROUP": expert_data,
                "_EXPERT_DATA_PARALLEL_GROUP_RANKS": dist.get_process_group_ranks(expert_data),
            }  # fmt: skip
            for table, value in tables.items():
                getattr(groups, table).clear()
                getattr(groups, table)[name] = value
            # With bf16 the norm of experts is summed over tensor-parallel ranks only where this says so.
            groups.expert_tensor_parallel_world_size = parallel_state.get_expert_tensor_parallel_world_size()

    return ExpertGroups()
