"""Gradient reductions over tensor- and pipeline-parallel ranks that Megatron's own optimizer would do and DeepSpeed does not.

DeepSpeed reduces over data-parallel ranks only. Without the hooks below, training with sequence parallelism or with tied
embeddings over pipeline stages goes wrong silently.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn


def install_sequence_parallel_hooks(model: nn.Module) -> None:
    """Sum gradients of parameters whose input is split along the sequence (norm weights) over the tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()

    def all_reduce(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=group)
        return grad

    for param in model.parameters():
        if getattr(param, "sequence_parallel", False):
            param.register_hook(all_reduce)


def shared_embedding(model: nn.Module) -> nn.Parameter | None:
    """This stage's copy of an embedding weight that the last pipeline stage also holds; None where there is one copy only.

    The last stage's copy is marked, so that DeepSpeed's gradient norm counts the weight once.
    """
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    if not model.share_embeddings_and_output_weights or first == last:
        return None
    weight = model.shared_embedding_or_output_weight()
    if last:
        weight.ds_pipe_replicated = True
    return weight


def reduce_shared_embedding(weight: nn.Parameter, optimizer) -> None:
    """Sum the two copies' gradients of this step, wherever the ZeRO optimizer keeps them (fp32 accumulators with bf16)."""
    grad = getattr(weight, "_hp_grad", None)
    if grad is None:
        grad = optimizer.get_gradient_for_reduction(weight)
    dist.all_reduce(grad, group=parallel_state.get_embedding_group())
