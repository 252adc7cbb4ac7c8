"""Per-token statistics over the full feature width: the l2 rescale of Q-Sparse and BitNet's sub-layer norm.

`reduce_sum` turns a shard's [..., 1] sum into the sum over the whole width (forward and backward); None where the width
is whole on this rank.
"""

from collections.abc import Callable

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def _sum_of_squares(x: torch.Tensor, reduce_sum: Reduce | None) -> torch.Tensor:
    total = x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1, keepdim=True)
    return total if reduce_sum is None else reduce_sum(total)


def l2_rescale(sparse: torch.Tensor, x: torch.Tensor, reduce_sum: Reduce | None = None) -> torch.Tensor:
    """`sparse * ||x|| / ||sparse||`: the masked token gets back the norm it had (Q-Sparse sec. 2.1; an option, off by default).

    sparse: x after the mask, x: before it; both [..., width]. A token of zeros stays zero.
    """
    before, after = _sum_of_squares(x, reduce_sum), _sum_of_squares(sparse, reduce_sum)
    tiny = torch.finfo(before.dtype).tiny
    factor = before.clamp(min=tiny).sqrt() / after.clamp(min=tiny).sqrt()
    return (sparse.to(factor.dtype) * factor).to(sparse.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, width: int, eps: float, reduce_sum: Reduce | None = None) -> torch.Tensor:
    """RMSNorm over a token of `width` features of which x [..., local width] may be a shard; weight: [local width].

    Computed in fp32, rounded once. SubLN (BitNet b1.58 2B4T, arXiv 2504.12285) is this norm before the o and down projections.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    inverse = torch.rsqrt(_sum_of_squares(x, reduce_sum) / width + eps)
    return (x.to(dtype) * inverse * weight.to(dtype)).to(x.dtype)
