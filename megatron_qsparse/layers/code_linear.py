"""The quantized linear as one autograd function: it multiplies codes and communicates codes.

`y = (sum of int8 x ternary products * scale) * alpha`, rounded once. The master weight takes part only as the receiver of
its straight-through gradient; it is not saved. Saved for the backward: this rank's int8 activation codes, one scale per
token, and the weight's code buffer by reference (1 byte a weight, shared by all micro-batches of a step). Keeping the
buffer in `save_for_backward` makes autograd refuse a refresh between a forward and its backward.

Without a code buffer (ZeRO-3) the weight itself is saved, again by reference, and quantized anew in the backward: autograd
hands out the parameter object, whose data ZeRO empties after the forward and fills again before the backward.
"""

import torch
import torch.distributed as dist

from megatron_qsparse.layers.collectives import gather_tokens
from megatron_qsparse.ops.product import scaled_product
from megatron_qsparse.ops.quantize import ternary_codes


class CodeLinear(torch.autograd.Function):
    """apply(x, weight, codes, scale, weight_codes, alpha, sequence_parallel, allreduce_dgrad, group) -> y

    x: [..., inputs], floating, of which `codes` (int8, same shape) and `scale` ([..., 1]) are the quantization; x itself only
    routes its straight-through gradient. weight: [outputs, inputs]; weight_codes: int8 of the same shape, or None to make them
    from the weight in the forward and in the backward, a leaf that must be whole at both; alpha: [outputs].
    With `sequence_parallel` the first dimension of x is a shard, and codes and scales are gathered: int8 on the wire, half
    the bytes of bf16, in the forward and again in the backward. Returns y [..., outputs] in x's dtype.
    """

    @staticmethod
    def forward(ctx, x, weight, codes, scale, weight_codes, alpha, sequence_parallel, allreduce_dgrad, group):
        all_codes = codes
        if sequence_parallel:
            all_codes, scale = gather_tokens(codes, group), gather_tokens(scale, group)
        kept = weight_codes if weight_codes is not None else weight
        y = scaled_product(all_codes.flatten(0, -2), scale.flatten(0, -2), _codes_of(kept, alpha), alpha).to(x.dtype)
        ctx.save_for_backward(codes, scale, kept, alpha)
        ctx.sequence_parallel, ctx.allreduce_dgrad, ctx.group = sequence_parallel, allreduce_dgrad, group
        return y.view(*all_codes.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad_y):
        codes, scale, kept, alpha = ctx.saved_tensors
        dtype = grad_y.dtype
        grad = grad_y.flatten(0, -2)
        grad_x = grad_weight = pending = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * alpha).to(dtype) @ _codes_of(kept, alpha).to(dtype)
            if ctx.sequence_parallel:
                whole, grad_x = grad_x, grad_x.new_empty((grad_x.shape[0] // ctx.group.size(), grad_x.shape[1]))
                pending = dist.reduce_scatter_tensor(grad_x, whole, group=ctx.group, async_op=True)
            elif ctx.allreduce_dgrad:
                pending = dist.all_reduce(grad_x, group=ctx.group, async_op=True)
        if ctx.needs_input_grad[1]:
            all_codes = gather_tokens(codes, ctx.group) if ctx.sequence_parallel else codes
            grad_weight = (grad * scale.flatten(0, -2)).to(dtype).t() @ all_codes.flatten(0, -2).to(dtype)
        if pending is not None:
            pending.wait()
        return None if grad_x is None else grad_x.view(codes.shape), grad_weight, *[None] * 7


def _codes_of(kept: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Ternary codes: `kept` itself, or of the weight that was kept instead. Raises RuntimeError where that weight is empty."""
    if kept.dtype == torch.int8:
        return kept
    if kept.dim() != 2 or kept.shape[0] != alpha.shape[0]:
        raise RuntimeError(
            f"the weight of a quantized linear is {list(kept.shape)} where {alpha.shape[0]} rows are needed: ZeRO-3 has not gathered it"
        )
    return ternary_codes(kept, alpha)
