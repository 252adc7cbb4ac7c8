"""Codes and scales against the formulas of Q-Sparse sec. 2.2, written out with numpy in float64 and float32."""

import numpy as np
import pytest
import torch

from megatron_qsparse.ops.product import scaled_product
from megatron_qsparse.ops.quantize import EPSILON, absmean, absolute_sums, int8_absmax, ternary_absmean, ternary_codes
from megatron_qsparse.ops.sparsify import sparsify
from megatron_qsparse.ops.topk import topk_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _literal_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gamma = np.maximum(np.abs(x).max(-1, keepdims=True), x.dtype.type(1e-5))
    codes = np.clip(np.rint(x * (x.dtype.type(127) / gamma)), -128, 127)
    return codes.astype(np.int8), gamma / x.dtype.type(127)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 64, 1000])
def test_int8_is_the_formula_bit_for_bit(dtype, width):
    x = _random(64, width, dtype=dtype) * 3
    codes, scale = int8_absmax(x)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    expected_codes, expected_scale = _literal_int8(x.to(working).numpy())
    assert (codes.dtype, scale.dtype) == (torch.int8, working)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert np.array_equal(scale.numpy(), expected_scale)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_int8_stays_within_half_a_step_of_float64(dtype):
    x = _random(64, 200, dtype=dtype)
    codes, scale = int8_absmax(x)
    error = (codes.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() * (0.5 + 1e-5)).all()
    assert codes.abs().amax(-1).eq(127).all()


def test_int8_rounds_half_to_even():
    # gamma 127 makes the code the value itself.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5]])
    assert int8_absmax(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 126]]


def test_int8_divides_truly():
    """`127 / tensor` is a product with the reciprocal and gives another code here; the definition divides."""
    x = torch.tensor([[15.0, 7.5, 1.0]])
    gamma = x.abs().amax(-1, keepdim=True)
    divided, multiplied = torch.tensor(127.0) / gamma, 127 / gamma
    assert divided != multiplied
    assert (x * divided).round().tolist() != (x * multiplied).round().tolist()
    assert int8_absmax(x)[0].tolist() == (x * divided).round().tolist()


def test_division_by_the_reciprocal_differs_in_many_scales():
    gamma = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) + 0.1
    assert 0.1 < (torch.tensor(127.0) / gamma != 127 / gamma).float().mean() < 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_commute_with_the_mask(dtype):
    x = _random(50, 96, dtype=dtype)
    x[0] = 0
    x[1].relu_()
    for k in (1, 40, 96):
        mask = topk_mask(x, k)
        codes, scale = int8_absmax(x)
        masked_codes, masked_scale = int8_absmax(sparsify(x, mask))
        assert torch.equal(torch.where(mask, codes, torch.zeros_like(codes)), masked_codes)
        assert torch.equal(scale, masked_scale)


def test_choosing_on_codes_would_be_another_mask():
    x = _random(64, 512, dtype=torch.float32)
    assert not torch.equal(topk_mask(int8_absmax(x)[0].float(), 200), topk_mask(x, 200))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_zeros_and_of_less_than_epsilon(dtype):
    x = torch.zeros(2, 4, dtype=dtype)
    x[1] = torch.tensor([1e-6, -1e-6, 0, 5e-7]).to(dtype)
    codes, scale = int8_absmax(x)
    assert codes[0].eq(0).all()
    assert scale.eq(torch.tensor(EPSILON, dtype=scale.dtype) / torch.tensor(127, dtype=scale.dtype)).all()
    assert codes[1, 0] == 13


def test_absmax_of_shards_is_made_global():
    x = _random(9, 32, dtype=torch.float32)
    codes, scale = int8_absmax(x)
    for part, start in ((x[:, :8], 0), (x[:, 8:], 8)):
        local_codes, local_scale = int8_absmax(part, reduce_max=lambda local: x.abs().amax(-1, keepdim=True))
        assert torch.equal(local_codes, codes[:, start : start + part.shape[1]])
        assert torch.equal(local_scale, scale)


def test_a_local_nan_survives_a_reduction_that_loses_it():
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    _, scale = int8_absmax(x, reduce_max=lambda local: torch.full_like(local, 3.0))
    assert scale[0].isnan() and scale[1] == 3 / 127


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_tokens_end_up_in_the_output(bad, dtype):
    x = _random(3, 16, dtype=dtype)
    x[1, 5] = bad
    weight_codes, alpha = ternary_absmean(_random(8, 16, dtype=dtype, seed=1))
    y = scaled_product(*int8_absmax(sparsify(x, topk_mask(x, 6))), weight_codes, alpha)
    assert not y[1].isfinite().any()
    assert y[[0, 2]].isfinite().all()


def test_int8_of_no_tokens_and_of_odd_layouts():
    codes, scale = int8_absmax(torch.empty(0, 8))
    assert (codes.shape, scale.shape) == ((0, 8), (0, 1))
    x = _random(6, 10, dtype=torch.float32)
    expected = int8_absmax(x)
    for view in (x.t().contiguous().t(), torch.stack([x, x], -1)[..., 0], x.view(2, 3, 10)):
        for result, reference in zip(int8_absmax(view), expected, strict=True):
            assert torch.equal(result.reshape(reference.shape), reference)


def test_int8_leaves_its_input_and_the_graph_alone():
    x = _random(2, 4, dtype=torch.float32).requires_grad_()
    before = x.detach().clone()
    codes, scale = int8_absmax(x)
    assert torch.equal(x, before) and not scale.requires_grad and not codes.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_ternary_is_the_formula(dtype):
    weight = _random(33, 65, dtype=dtype) * 0.02
    codes, alpha = ternary_absmean(weight)
    working = np.float64 if dtype == torch.float64 else np.float32
    literal = weight.to(torch.float64).numpy()
    expected = np.maximum(np.abs(literal).mean(), 1e-5).astype(working)
    assert abs(alpha.item() - expected) <= np.finfo(working).eps * expected
    assert np.array_equal(codes.numpy(), np.clip(np.rint(literal.astype(working) / working(alpha.item())), -1, 1).astype(np.int8))
    assert (codes.dtype, codes.unique().tolist()) == (torch.int8, [-1, 0, 1])


def test_ternary_rounds_half_to_even_and_clamps():
    alpha = torch.tensor(2.0)
    weight = torch.tensor([[1.0, -1.0, 1.0000001, -3.0, 100.0, 0.0]])
    assert ternary_codes(weight, alpha).tolist() == [[0, 0, 1, -1, 1, 0]]


def test_every_logical_matrix_has_its_own_alpha():
    weight = torch.cat([_random(4, 16) * scale for scale in (0.01, 1, 100)]).float()[torch.tensor([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])]
    labels = torch.tensor([0, 1, 2] * 4)
    alpha = absmean(absolute_sums(weight, labels, 3), torch.full((3,), 64.0, dtype=torch.float64), weight.dtype)
    codes = ternary_codes(weight, alpha[labels])
    for matrix in range(3):
        own_codes, own_alpha = ternary_absmean(weight[labels == matrix])
        assert torch.equal(alpha[matrix], own_alpha)
        assert torch.equal(codes[labels == matrix], own_codes)
        assert (codes[labels == matrix] * alpha[matrix]).unique().numel() == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_absmean_does_not_depend_on_the_cut(dtype):
    weight = _random(64, 96, dtype=dtype) * 0.02
    labels = torch.arange(64) % 3
    counts = torch.bincount(labels).double() * 96
    whole = absmean(absolute_sums(weight, labels, 3), counts, dtype)
    assert whole.dtype == torch.float32
    for parts in (2, 4, 8):
        by_rows = sum(absolute_sums(w, n, 3) for w, n in zip(weight.chunk(parts), labels.chunk(parts), strict=True))
        by_columns = sum(absolute_sums(w, labels, 3) for w in weight.chunk(parts, dim=1))
        assert torch.equal(absmean(by_rows, counts, dtype), whole)
        assert torch.equal(absmean(by_columns, counts, dtype), whole)


def test_sums_are_taken_in_float64():
    weight = torch.full((1, 100_001), 1e-4)
    weight[0, 0] = 1e6
    total = absolute_sums(weight, torch.zeros(1, dtype=torch.long), 1)
    assert total.dtype == torch.float64
    # In float32 each addition to 1e6 would be lost: 1e-4 is below half its last bit.
    assert total.item() == pytest.approx(1e6 + 100_000 * float(np.float32(1e-4)), rel=1e-11)


def test_weights_of_zeros_and_nans():
    codes, alpha = ternary_absmean(torch.zeros(3, 4))
    assert codes.eq(0).all() and alpha.item() == pytest.approx(EPSILON)
    weight = torch.ones(3, 4)
    weight[1, 1] = float("nan")
    assert ternary_absmean(weight)[1].isnan()


def test_codes_are_written_in_place_where_asked():
    weight = _random(5, 6, dtype=torch.bfloat16)
    buffer = torch.full((5, 6), 9, dtype=torch.int8)
    expected, alpha = ternary_absmean(weight)
    assert ternary_codes(weight, alpha, out=buffer) is buffer
    assert torch.equal(buffer, expected)
