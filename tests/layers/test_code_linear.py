"""CodeLinear against the usual formulation with dequantized operands and `detach`, in float64."""

import pytest
import torch

from megatron_qsparse.layers.code_linear import CodeLinear
from megatron_qsparse.ops.quantize import absmean, absolute_sums, int8_absmax, ternary_codes
from megatron_qsparse.ops.sparsify import sparsify
from megatron_qsparse.ops.topk import topk_mask

TOKENS, INPUTS, OUTPUTS, K = (7, 3), 64, 48, 24
LABELS = torch.tensor([0] * 24 + [1] * 12 + [2] * 12)
"""Three logical matrices, as in qkv."""


def _operands(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*TOKENS, INPUTS, generator=generator, dtype=torch.float64)
    weight = torch.randn(OUTPUTS, INPUTS, generator=generator, dtype=torch.float64) * (1 + LABELS)[:, None] * 0.05
    grad = torch.randn(*TOKENS, OUTPUTS, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), grad.to(dtype)


def _quantized_weight(weight):
    counts = torch.bincount(LABELS).double() * INPUTS
    alpha = absmean(absolute_sums(weight, LABELS, 3), counts, weight.dtype)[LABELS]
    return ternary_codes(weight, alpha), alpha


def _ours(x, weight):
    codes, alpha = _quantized_weight(weight)
    kept = sparsify(x, topk_mask(x, K))
    return CodeLinear.apply(kept, weight, *int8_absmax(kept), codes, alpha, False, False, None)


def _literal(x, weight):
    """Top-K, int8 absmax and ternary absmean of three matrices, straight-through by `detach`."""

    def straight_through(value, quantized):
        return value + (quantized - value).detach()

    largest = x.detach().abs().topk(K, dim=-1).indices
    mask = torch.zeros_like(x).scatter_(-1, largest, 1.0)
    kept = straight_through(x, x * mask)
    gamma = kept.detach().abs().amax(-1, keepdim=True)
    operand = straight_through(kept, (kept * 127 / gamma).round().clamp(-128, 127) * gamma / 127)
    alpha = torch.cat([weight[LABELS == i].abs().mean().expand(int((LABELS == i).sum())) for i in range(3)]).detach()[:, None]
    ternary = straight_through(weight, (weight / alpha).round().clamp(-1, 1) * alpha)
    return operand @ ternary.t()


def test_output_and_both_gradients_are_those_of_the_literal_formulation():
    x, weight, grad = _operands()
    found, expected = _ours(x, weight), _literal(x, weight)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13)
    for ours, literal in zip(torch.autograd.grad(found, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True):
        assert torch.allclose(ours, literal, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_code_buffer_the_weight_is_quantized_again_and_every_bit_is_the_same(dtype):
    """ZeRO-3 replaces the weight's data between the forward and the backward."""
    x, weight, grad = _operands(dtype)
    codes, alpha = _quantized_weight(weight)
    quantized = int8_absmax(x)
    expected = CodeLinear.apply(x, weight, *quantized, codes, alpha, False, False, None)
    expected_grads = torch.autograd.grad(expected, (x, weight), grad)
    found = CodeLinear.apply(x, weight, *quantized, None, alpha, False, False, None)
    whole, weight.data = weight.data, torch.empty(0, dtype=dtype)
    weight.data = whole.clone()
    whole.fill_(torch.nan)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, torch.autograd.grad(found, (x, weight), grad), expected_grads))


def test_an_empty_weight_is_an_error_in_the_forward_and_in_the_backward():
    x, weight, grad = _operands()
    _, alpha = _quantized_weight(weight)
    y = CodeLinear.apply(x, weight, *int8_absmax(x), None, alpha, False, False, None)
    weight.data = torch.empty(0, dtype=weight.dtype)
    with pytest.raises(RuntimeError, match="48 rows.*not gathered"):
        y.backward(grad)
    with pytest.raises(RuntimeError, match="48 rows.*not gathered"):
        CodeLinear.apply(x, weight, *int8_absmax(x), None, alpha, False, False, None)


def test_dropped_inputs_and_weights_of_code_zero_receive_their_gradient():
    x, weight, grad = _operands()
    codes, _ = _quantized_weight(weight)
    grad_x, grad_weight = torch.autograd.grad(_ours(x, weight), (x, weight), grad)
    assert (codes == 0).any() and (grad_weight[codes == 0] != 0).all()
    assert (grad_x[~topk_mask(x, K)] != 0).all()


def test_the_weight_gradient_uses_the_sparse_input():
    x, weight, grad = _operands()
    with torch.no_grad():
        x[..., :10] *= 1e-3
    assert not topk_mask(x, K)[..., :10].any()
    (grad_weight,) = torch.autograd.grad(_ours(x, weight), weight, grad)
    assert (grad_weight[:, :10] == 0).all() and (grad_weight[:, 10:] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_is_rounded_once(dtype):
    """Equal to the float64 result of the same codes and scales, rounded: the integer sum itself loses nothing."""
    x, weight, _ = _operands(dtype)
    weight_codes, alpha = _quantized_weight(weight)
    codes, scale = int8_absmax(x)
    found = CodeLinear.apply(x, weight, codes, scale, weight_codes, alpha, False, False, None)
    exact = codes.long().flatten(0, 1) @ weight_codes.long().t()
    expected = (exact.float() * scale.flatten(0, 1) * alpha).to(dtype).view(*TOKENS, OUTPUTS)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_frozen_operand_gets_no_gradient(frozen):
    x, weight, grad = _operands()
    (x if frozen == "x" else weight).requires_grad_(False)
    _ours(x, weight).backward(grad)
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")


def test_no_tokens_and_all_zero_tokens():
    _, weight, _ = _operands()
    for shape in ((0, 3), (4, 2)):
        x = torch.zeros(*shape, INPUTS, dtype=torch.float64, requires_grad=True)
        weight.grad = None
        codes, alpha = _quantized_weight(weight)
        y = CodeLinear.apply(x, weight, *int8_absmax(x), codes, alpha, False, False, None)
        y.sum().backward()
        assert y.shape == (*shape, OUTPUTS) and not y.any()
        assert x.grad.shape == x.shape and weight.grad.isfinite().all() and not weight.grad.any()


def test_a_refresh_between_forward_and_backward_is_an_autograd_error():
    x, weight, grad = _operands()
    codes, alpha = _quantized_weight(weight)
    y = CodeLinear.apply(x, weight, *int8_absmax(x), codes, alpha, False, False, None)
    ternary_codes(weight, alpha, out=codes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)
