"""The straight-through sparsifier against its formulas in float64 (Q-Sparse sec. 2.3)."""

import pytest
import torch

from megatron_qsparse.ops.sparsify import sparsify
from megatron_qsparse.ops.topk import topk_mask


def _linear(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(7, 12, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    grad = torch.randn(5, 7, generator=generator, dtype=torch.float64).to(dtype)
    return x, weight, grad


def test_forward_and_both_gradients_follow_the_formulas():
    x, weight, grad = _linear()
    mask = topk_mask(x, 4)
    y = sparsify(x, mask) @ weight.t()
    y.backward(grad)
    masked = x.detach() * mask
    torch.testing.assert_close(y, masked @ weight.detach().t(), rtol=1e-13, atol=1e-13)
    # As if there were no mask, for the input; with the sparse input, for the weight.
    torch.testing.assert_close(x.grad, grad @ weight.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(weight.grad, grad.t() @ masked, rtol=1e-13, atol=1e-13)
    dropped = ~mask.any(0)
    assert dropped.any() and weight.grad[:, dropped].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradient_is_the_identity_bit_for_bit(dtype):
    x, _, _ = _linear(dtype)
    upstream = torch.full_like(x, float("inf"))
    upstream[0] = float("nan")
    upstream[1:3] = torch.randn(2, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = sparsify(x, topk_mask(x, 3))
    assert out.dtype == dtype
    (grad,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(grad.nan_to_num(7.0), upstream.nan_to_num(7.0))


def test_dropped_infinities_and_nans_become_zero():
    x = torch.tensor([[1.0, float("inf"), float("nan"), float("-inf")]])
    out = sparsify(x, torch.tensor([[True, False, False, False]]))
    assert torch.equal(out, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_survivors_keep_their_bits_negative_zero_included():
    x = torch.tensor([[-0.0, 1e-45, -3.0]])
    out = sparsify(x, torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_tokens(shape):
    x = torch.empty(shape, requires_grad=True)
    sparsify(x, topk_mask(x, 3)).sum().backward()
    assert x.grad.shape == shape


def test_layout_does_not_matter():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
    out = sparsify(x, topk_mask(x, 3))
    assert torch.equal(out, x * topk_mask(x, 3))
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, 2.0))
    assert torch.equal(grad, torch.full_like(x, 2.0))
