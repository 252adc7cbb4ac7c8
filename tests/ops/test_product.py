"""The integer product is exact, and its epilogue has one order."""

import pytest
import torch

from megatron_qsparse.ops.product import MAX_INPUTS, integer_product, scaled_product


def _codes(tokens, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (tokens, inputs), generator=generator, dtype=torch.int8)
    return codes, torch.randint(-1, 2, (outputs, inputs), generator=generator, dtype=torch.int8)


def _exact(codes, weight_codes):
    return codes.long() @ weight_codes.long().t()


@pytest.mark.parametrize("tokens", [0, 1, 3, 16, 17])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 5), (33, 17), (64, 64), (257, 9)])
def test_sums_are_exact(tokens, inputs, outputs):
    codes, weight_codes = _codes(tokens, inputs, outputs)
    result = integer_product(codes, weight_codes)
    assert (result.dtype, result.shape) == (torch.float32, (tokens, outputs))
    assert torch.equal(result.long(), _exact(codes, weight_codes))


@pytest.mark.parametrize("inputs", [1000, MAX_INPUTS])
def test_extreme_sums_are_exact(inputs):
    codes = torch.full((3, inputs), 127, dtype=torch.int8)
    codes[1] = -127
    codes[2, ::2] = -127
    weight_codes = torch.ones(3, inputs, dtype=torch.int8)
    weight_codes[1] = -1
    weight_codes[2, ::2] = -1
    assert torch.equal(integer_product(codes, weight_codes).long(), _exact(codes, weight_codes))


def test_the_limit_is_where_float32_stops_counting():
    assert 127 * MAX_INPUTS < 1 << 24 <= 127 * (MAX_INPUTS + 1)
    wide = torch.zeros(1, MAX_INPUTS + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=f"{MAX_INPUTS + 1} inputs.*{MAX_INPUTS}"):
        integer_product(wide, wide)


def test_layout_does_not_matter():
    codes, weight_codes = _codes(17, 33, 9)
    expected = integer_product(codes, weight_codes)
    assert torch.equal(integer_product(codes.t().contiguous().t(), weight_codes.t().contiguous().t()), expected)
    assert torch.equal(integer_product(torch.stack([codes] * 2, -1)[..., 1], torch.stack([weight_codes] * 2, -1)[..., 1]), expected)


def test_the_epilogue_scales_tokens_first():
    codes, weight_codes = _codes(40, 64, 24)
    scale = torch.rand(40, 1, generator=torch.Generator().manual_seed(1)) / 127
    alpha = torch.rand(24, generator=torch.Generator().manual_seed(2)) / 50
    sums = _exact(codes, weight_codes).float()
    result = scaled_product(codes, scale, weight_codes, alpha)
    assert torch.equal(result, (sums * scale) * alpha)
    # Another association has other bits, or this test would show nothing.
    assert not torch.equal(result, sums * (scale * alpha))
    assert torch.equal(scaled_product(codes, scale, weight_codes, alpha[0]), (sums * scale) * alpha[0])


def test_float64_is_the_dequantized_product():
    codes, weight_codes = _codes(10, 48, 12)
    scale = torch.rand(10, 1, dtype=torch.float64) / 127
    alpha = torch.rand(12, dtype=torch.float64)
    dequantized = (codes * scale) @ (weight_codes * alpha[:, None]).t()
    result = scaled_product(codes, scale, weight_codes, alpha)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, dequantized, rtol=1e-12, atol=1e-12)


def test_no_tokens():
    codes, weight_codes = _codes(0, 8, 5)
    assert scaled_product(codes, torch.empty(0, 1), weight_codes, torch.ones(5)).shape == (0, 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(0, 8, 8), (1, 64, 64), (17, 64, 64), (32, 33, 9), (64, 11008, 128)])
def test_cuda_sums_are_exact(tokens, inputs, outputs):
    codes, weight_codes = _codes(tokens, inputs, outputs)
    assert torch.equal(integer_product(codes.cuda(), weight_codes.cuda()).cpu().long(), _exact(codes, weight_codes))
