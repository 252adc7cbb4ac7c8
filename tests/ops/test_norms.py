"""The two whole-token statistics against their formulas, gradients by finite differences included."""

import pytest
import torch

from megatron_qsparse.ops.norms import l2_rescale, rms_norm
from megatron_qsparse.ops.sparsify import sparsify
from megatron_qsparse.ops.topk import topk_mask

TOLERANCES = [(torch.bfloat16, 4e-3), (torch.float16, 5e-4), (torch.float32, 5e-7), (torch.float64, 1e-14)]
"""Relative: one rounding of a 16-bit result, a few of fp32 and fp64."""


def _random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _literal_rms_norm(x, weight, eps):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_rms_norm_is_the_formula(dtype, tolerance):
    x, weight = 3 * _random(6, 40, dtype=dtype), _random(40, dtype=dtype, seed=1)
    result = rms_norm(x, weight, 40, 1e-5)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), _literal_rms_norm(x, weight, 1e-5), rtol=tolerance, atol=0)


def test_rms_norm_rounds_once():
    x, weight = _random(50, 64, dtype=torch.bfloat16), _random(64, dtype=torch.bfloat16, seed=1)
    once = rms_norm(x.float(), weight.float(), 64, 1e-5).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 64, 1e-5), once)


def test_rms_norm_gradients():
    x, weight = _random(3, 7).requires_grad_(), _random(7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 7, 1e-5), (x, weight))


def test_rms_norm_of_a_shard_uses_the_sum_over_the_whole_token():
    x, weight = _random(5, 12), _random(12, seed=1)
    whole = rms_norm(x, weight, 12, 1e-5)
    total = x.square().sum(-1, keepdim=True)
    shards = [rms_norm(x[:, cut], weight[cut], 12, 1e-5, reduce_sum=lambda _: total) for cut in (slice(0, 5), slice(5, 12))]
    torch.testing.assert_close(torch.cat(shards, -1), whole, rtol=1e-14, atol=0)


def test_rms_norm_of_zeros_is_zero_with_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8), 8, 1e-5)
    out.sum().backward()
    assert out.eq(0).all() and x.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_l2_rescale_is_the_formula_and_preserves_the_norm(dtype, tolerance):
    x = _random(6, 40, dtype=dtype)
    sparse = sparsify(x, topk_mask(x, 9))
    result = l2_rescale(sparse, x)
    literal = sparse.double() * x.double().norm(dim=-1, keepdim=True) / sparse.double().norm(dim=-1, keepdim=True)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), literal, rtol=tolerance, atol=0)
    torch.testing.assert_close(result.double().norm(dim=-1), x.double().norm(dim=-1), rtol=tolerance, atol=0)


def test_l2_rescale_gradients():
    x, sparse = _random(3, 7).requires_grad_(), _random(3, 7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(l2_rescale, (sparse, x))


def test_l2_rescale_behind_the_straight_through_mask():
    """d/dx of `s * |x| / |s|` with s = x * M and ds/dx = 1, written out for one token."""
    x = _random(1, 6).requires_grad_()
    mask = topk_mask(x, 2)
    upstream = _random(1, 6, seed=2)
    (grad,) = torch.autograd.grad(l2_rescale(sparsify(x, mask), x), x, upstream)
    value = x.detach()
    s = value * mask
    a, b = value.norm(), s.norm()
    projected = (upstream * s).sum()
    expected = upstream * a / b + projected * value / (a * b) - projected * a * s / b**3
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_l2_rescale_of_zeros_stays_zero_with_finite_gradients():
    x = torch.zeros(2, 8, requires_grad=True)
    out = l2_rescale(sparsify(x, topk_mask(x, 3)), x)
    out.sum().backward()
    assert out.eq(0).all() and x.grad.isfinite().all()


def test_l2_rescale_of_a_shard_without_survivors():
    x = torch.tensor([[3.0, 4.0, 0.1, 0.2]])
    sparse = sparsify(x, torch.tensor([[True, True, False, False]]))
    totals = iter([x.square().sum(-1, keepdim=True), sparse.square().sum(-1, keepdim=True)])
    assert l2_rescale(sparse[:, 2:], x[:, 2:], reduce_sum=lambda _: next(totals)).eq(0).all()


@pytest.mark.parametrize("call", [lambda x: rms_norm(x, torch.ones(8), 8, 1e-5), lambda x: l2_rescale(x, x)])
def test_no_tokens(call):
    assert call(torch.empty(0, 8)).shape == (0, 8)
