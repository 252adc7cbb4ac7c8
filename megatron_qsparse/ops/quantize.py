"""Integer codes: int8 activations (absmax per token) and ternary weights (absmean per logical matrix).

Q-Sparse sec. 2.2 and BitNet b1.58: `x ~ codes * scale`, `W ~ codes * alpha`. A linear layer multiplies the codes and scales
the sum; the dequantized operands are never formed. All divisions are tensor by tensor: torch evaluates `127 / tensor`
as `127 * reciprocal`, which differs from a true division in about a quarter of all values and then flips codes.
"""

from collections.abc import Callable

import torch

EPSILON = 1e-5
"""Lower bound of gamma (activations) and alpha (weights), as in the b1.58 reference."""

INT8_LEVELS = 127


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: the dtype of scales and of the epilogue."""
    return torch.promote_types(dtype, torch.float32)


def int8_absmax(x: torch.Tensor, reduce_max: Callable[[torch.Tensor], torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and scale of each token: `gamma = max|x|`, `codes = round(x * (127 / gamma))`, `scale = gamma / 127`.

    x: [..., width] floating. reduce_max: makes the local maxima [..., 1] global where `width` is only a shard.
    Returns (codes int8 [..., width], scale fp32 [..., 1]). round is half to even. |codes| <= 127 by construction: gamma is
    the maximum, so no clamp is needed. A token with NaN or infinity gets a scale that is not finite, so that the layer's
    output shows it. Source: Q-Sparse sec. 2.2.
    """
    dtype = accumulation_dtype(x.dtype)
    gamma = x.detach().abs().amax(-1, keepdim=True).to(dtype)
    if reduce_max is not None:
        # Reductions may lose NaN (gloo's MAX does, depending on rank order); this rank's own must reach the output.
        gamma = torch.where(gamma.isnan(), gamma, reduce_max(gamma))
    gamma = gamma.clamp(min=EPSILON)
    levels = torch.tensor(INT8_LEVELS, dtype=dtype, device=x.device)
    codes = x.detach().to(dtype, copy=True).mul_(levels / gamma).round_().to(torch.int8)
    return codes, gamma / levels


def absolute_sums(weight: torch.Tensor, labels: torch.Tensor, matrices: int) -> torch.Tensor:
    """Sum of |w| of each logical matrix, fp64 [matrices].

    weight: [rows, columns]; labels: int64 [rows], the logical matrix of each row. fp64 makes the total independent, to the
    last bit of an fp32 mean, of how rows or columns are spread over ranks.
    """
    per_row = torch.linalg.vector_norm(weight.detach(), 1, dim=-1, dtype=torch.float64)
    return torch.zeros(matrices, dtype=torch.float64, device=weight.device).index_add_(0, labels, per_row)


def absmean(sums: torch.Tensor, counts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """alpha = max(sum / count, 1e-5). sums: fp64 [matrices]; counts: entries per matrix, fp64 [matrices]."""
    return (sums / counts).to(accumulation_dtype(dtype)).clamp_(min=EPSILON)


def ternary_codes(weight: torch.Tensor, alpha: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """clamp(round(w / alpha), -1, 1) as int8 [rows, columns]; alpha: [rows] (one per row) or [] (one for all).

    Written into `out` where given: the codes are made once per optimizer step and shared by all micro-batches.
    """
    alpha = alpha[:, None] if alpha.dim() else alpha
    codes = (weight.detach().to(alpha.dtype) / alpha).round_().clamp_(-1, 1)
    return codes.to(torch.int8) if out is None else out.copy_(codes)


def ternary_absmean(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [rows, columns] and alpha [] of one whole logical matrix (BitNet b1.58; Q-Sparse sec. 2.2)."""
    sums = absolute_sums(weight, torch.zeros(weight.shape[0], dtype=torch.long, device=weight.device), 1)
    alpha = absmean(sums, torch.tensor([weight.numel()], dtype=torch.float64, device=weight.device), weight.dtype)[0]
    return ternary_codes(weight, alpha), alpha
