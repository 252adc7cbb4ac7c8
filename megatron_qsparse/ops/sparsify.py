"""The straight-through sparsifier (Q-Sparse sec. 2.3): forward `x * M`, backward the identity.

Without it the gradient of dropped entries is zero, gradients vanish towards the bottom layers, and the loss is clearly worse.
Whatever multiplies the result saves the sparse operand, so the weight gradient uses `x * M`, as the paper has it.
"""

import torch


class _StraightThroughMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask):
        # `where`, not a product: inf * 0 would turn a dropped overflow into NaN.
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sparsify(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """x where mask is True, else 0; the gradient w.r.t. x is that of the identity. x: [..., width], mask: bool of x's shape."""
    return _StraightThroughMask.apply(x, mask)
