"""The integer product of codes and its fixed epilogue.

`y = (sum * scale) * alpha` in fp32, then ONE rounding to the working dtype; this order is part of the definition, since
`sum * (scale * alpha)` gives other bits. The sum of int8 x ternary products is below 2^24 up to 132,104 inputs, so it is
exact in int32 and in fp32, in any order: training, kernels and inference agree bit for bit.
"""

import torch

from megatron_qsparse.ops.counts import MAX_INPUTS


def integer_product(codes: torch.Tensor, weight_codes: torch.Tensor) -> torch.Tensor:
    """Exact sums of products, as fp32.

    codes: int8 [tokens, inputs]; weight_codes: int8 [outputs, inputs]. Returns fp32 [tokens, outputs].
    `torch.mm` on int8 wraps silently, so it is never used. Raises ValueError above `MAX_INPUTS` inputs.
    """
    tokens, inputs = codes.shape
    outputs = weight_codes.shape[0]
    if inputs > MAX_INPUTS:
        raise ValueError(f"{inputs} inputs: sums are exact in fp32 up to {MAX_INPUTS} only")
    if tokens == 0:
        return torch.zeros((0, outputs), dtype=torch.float32, device=codes.device)
    if codes.is_cuda and not _fits_cuda_int8(tokens, inputs, outputs):
        return torch.mm(codes.to(torch.bfloat16), weight_codes.t().to(torch.bfloat16), out_dtype=torch.float32)
    return torch._int_mm(codes, weight_codes.t()).float()


def scaled_product(codes: torch.Tensor, scale: torch.Tensor, weight_codes: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """`(codes @ weight_codes^T * scale) * alpha` before the rounding to the working dtype.

    codes: int8 [tokens, inputs]; scale: [tokens, 1]; weight_codes: int8 [outputs, inputs]; alpha: [outputs] or [].
    Returns [tokens, outputs] in scale's dtype (fp32; fp64 in tests).
    """
    return integer_product(codes, weight_codes).to(scale.dtype).mul_(scale).mul_(alpha)


def _fits_cuda_int8(tokens: int, inputs: int, outputs: int) -> bool:
    # cuBLASLt's int8 GEMM behind torch._int_mm wants more than 16 rows and multiples of 8.
    return tokens > 16 and inputs % 8 == 0 and outputs % 8 == 0
