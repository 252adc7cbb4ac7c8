"""Initial weights as a pure function of (seed, parameter name): one network for every tensor, pipeline and expert layout.

Megatron draws each rank's weights from a generator whose state depends on what the rank built before, so that another
layout starts from another network. Here the full matrix is drawn from a generator seeded by the parameter's global name
and the rank takes its shard. Always on the CPU, so a GPU starts from the same numbers.
"""

import hashlib

import torch
from megatron.core import parallel_state
from torch import nn

_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
_EXPERTS = "local_experts"
"""Megatron's name of the list of this rank's experts, followed by a number."""


def global_name(name: str, model: nn.Module) -> str:
    """A local parameter name with this rank's numbers of layer and expert replaced by the model's (0-based)."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(model.decoder.layers[int(parts[at])].layer_number - 1)
    if _EXPERTS in parts:
        at = parts.index(_EXPERTS) + 1
        local_experts = model.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        parts[at] = str(parallel_state.get_expert_model_parallel_rank() * local_experts + int(parts[at]))
    if model.share_embeddings_and_output_weights and parts[0] == "output_layer":
        return "embedding.word_embeddings.weight"
    return ".".join(parts)


@torch.no_grad()
def initialize_by_name(model: nn.Module, seed: int, std: float, residual_std: float) -> None:
    """Normal(0, std) matrices, Normal(0, residual_std) for the outputs of residual branches, ones for norms."""
    for name, param in model.named_parameters():
        if param.dim() == 1:
            param.fill_(1.0)
            continue
        scale = residual_std if name.endswith(_RESIDUAL_OUTPUTS) else std
        rank, ranks = _shard_of(name)
        param.copy_(_shard(_draw(global_name(name, model), seed, _full_shape(param, ranks), scale), param, rank, ranks))


def _draw(name: str, seed: int, shape: list[int], std: float) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)


def _shard_of(name: str) -> tuple[int, int]:
    """(rank, ranks) among those that hold shards of this parameter."""
    if _EXPERTS in name.split("."):
        return parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def _full_shape(param: nn.Parameter, ranks: int) -> list[int]:
    shape = list(param.shape)
    if getattr(param, "tensor_model_parallel", False):
        shape[param.partition_dim] *= ranks
    return shape


def _shard(full: torch.Tensor, param: nn.Parameter, rank: int, ranks: int) -> torch.Tensor:
    """This rank's part. A stride of 2 marks gate_up: each rank holds its share of the gate rows, then of the up rows."""
    if not getattr(param, "tensor_model_parallel", False):
        return full
    pieces = full.chunk(param.partition_stride, dim=param.partition_dim)
    return torch.cat([piece.chunk(ranks, dim=param.partition_dim)[rank] for piece in pieces], dim=param.partition_dim)
