"""Masks against a stable sort, the definition of "the K largest, of equal ones the lower index"."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qsparse.ops.topk import block_topk_mask, topk_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def oracle(x, k, groups=1):
    grouped = x.unflatten(-1, (groups, -1))
    order = grouped.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)


def _rows(width, dtype, rows=16):
    """Random rows, and among them zeros, relu, negative zero, one value, coarse values, infinities, NaN, subnormals."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    x[0] = 0
    x[1].relu_()
    x[2, ::2] = -0.0
    x[3] = -1
    x[4] = (2 * x[4]).round() / 2
    x[5, width // 2 :] = float("inf")
    x[6, width // 3] = float("-inf")
    x[7, width // 2] = float("nan")
    x[8, : width // 2 + 1] = float("nan")
    x[9] *= torch.finfo(dtype).tiny / 4
    x[10] *= torch.finfo(dtype).max / 8
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 7, 31, 64, 100, 257])
def test_mask_equals_a_stable_sort(dtype, width):
    x = _rows(width, dtype)
    for k in sorted({1, 2, width // 3, width // 2, width - 1, width}):
        if 1 <= k <= width:
            mask = topk_mask(x, k)
            assert torch.equal(mask, oracle(x, k)), k
            assert (mask.sum(-1) == k).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "groups"), [(64, 8), (88, 8), (96, 3), (60, 60), (60, 1)])
def test_groups_are_selected_on_their_own(dtype, width, groups):
    x = _rows(width, dtype)
    for k in sorted({1, (width // groups + 1) // 2, width // groups}):
        assert torch.equal(topk_mask(x, k, groups), oracle(x, k, groups))
        slices = [topk_mask(part, k) for part in x.chunk(groups, dim=-1)]
        assert torch.equal(topk_mask(x, k, groups), torch.cat(slices, dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(16, 32), (2, 4), (8, 16), (1, 8), (32, 32)])
def test_blocks_keep_n_of_every_m_consecutive(dtype, n, m):
    x = _rows(128, dtype)
    mask = block_topk_mask(x, n, m)
    assert torch.equal(mask, oracle(x, n, 128 // m))
    assert (mask.unflatten(-1, (-1, m)).sum(-1) == n).all()


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, float("inf"), float("-inf")]), min_size=1, max_size=24),
    data=st.data(),
)
@settings(max_examples=150)
def test_rows_full_of_ties(values, data):
    k = data.draw(st.integers(1, len(values)))
    for dtype in DTYPES:
        x = torch.tensor([values], dtype=dtype)
        assert torch.equal(topk_mask(x, k), oracle(x, k))


def test_values_that_tie_only_after_rounding_to_bf16():
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    mask = topk_mask(x, 200)
    threshold = x.abs().masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
    tied_outside = ((x.abs() == threshold) & ~mask).any(-1)
    # The rows that have a tie across the threshold are what this test is about.
    assert tied_outside.sum() > 20
    assert torch.equal(mask, oracle(x, 200))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [65_536, 65_537, 70_000])
def test_wide_rows(dtype, width):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 1
    x[2] = x[2].relu()
    assert torch.equal(topk_mask(x, width * 2 // 5), oracle(x, width * 2 // 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_and_leading_dimensions_do_not_matter(dtype):
    x = _rows(24, dtype, rows=12)
    expected = oracle(x, 5, 2)
    assert torch.equal(topk_mask(x.t().contiguous().t(), 5, 2), expected)
    assert torch.equal(topk_mask(torch.stack([x, x], dim=-1)[..., 1], 5, 2), expected)
    assert torch.equal(topk_mask(x.view(3, 4, 24), 5, 2), expected.view(3, 4, 24))
    assert torch.equal(topk_mask(x.view(4, 3, 24).transpose(0, 1), 5, 2), expected.view(4, 3, 24).transpose(0, 1))
    assert torch.equal(topk_mask(x[5], 5, 2), expected[5])
    assert torch.equal(topk_mask(x[::2], 5, 2), expected[::2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_tokens(dtype):
    assert topk_mask(torch.empty(0, 8, dtype=dtype), 3, 2).shape == (0, 8)
    assert topk_mask(torch.empty(2, 0, 8, dtype=dtype), 3).shape == (2, 0, 8)
    assert block_topk_mask(torch.empty(0, 8, dtype=dtype), 1, 4).shape == (0, 8)


def test_the_input_is_left_alone():
    x = _rows(40, torch.float32).requires_grad_()
    before = x.detach().clone()
    mask = topk_mask(x, 7)
    assert not mask.requires_grad
    assert torch.equal(x.detach().view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: topk_mask(x, 2, groups=3), "3 groups do not divide 8"),
        (lambda x: topk_mask(x, 2, groups=0), "0 groups"),
        (lambda x: topk_mask(x, 0), "cannot keep 0 of 8"),
        (lambda x: topk_mask(x, 5, groups=2), "cannot keep 5 of 4"),
        (lambda x: block_topk_mask(x, 1, 3), "blocks of 3 do not divide 8"),
        (lambda x: block_topk_mask(x, 1, 0), "blocks of 0"),
    ],
)
def test_misfits_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.ones(2, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_selects_the_same(dtype):
    x = _rows(256, dtype)
    assert torch.equal(topk_mask(x.cuda(), 13, 8).cpu(), oracle(x, 13, 8))
