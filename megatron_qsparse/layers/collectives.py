"""Reductions of per-token statistics [..., 1] over the ranks that hold shards of the feature dimension."""

import torch
import torch.distributed as dist


class _ReduceSum(torch.autograd.Function):
    """Every rank uses the total for its own shard, so the gradient of a partial sum is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx, partial, group):
        ctx.group = group
        total = partial.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def reduce_sum(partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over the group; an all-reduce forward and backward."""
    return _ReduceSum.apply(partial, group)


def reduce_max(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Maximum over the group, without a gradient."""
    total = local.clone()
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
    return total


def gather_tokens(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Concatenate the ranks' shards along the first (sequence) dimension."""
    gathered = local.new_empty((local.shape[0] * group.size(), *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered
