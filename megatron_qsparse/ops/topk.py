"""Top-K masks over the feature dimension: exactly K survive, of equal magnitudes the lower index wins.

Q-Sparse (arXiv 2407.10969) keeps the K entries of largest |x| of each token (sec. 2.1); Block Q-Sparse keeps N of every M
consecutive ones (sec. 2.4). `torch.topk` leaves the choice among equal magnitudes open, so two back ends, or two layouts
of one model, would disagree; in bf16 most rows have such a tie at the threshold.

The selection runs on an integer key, (magnitude bits, inverted index), which makes all entries of a row distinct, so that
"at least the K-th largest key" is an exact mask. IEEE magnitudes order like their bit patterns. NaN ranks above infinity.
"""

import numpy as np
import torch


def topk_mask(x: torch.Tensor, k: int, groups: int = 1) -> torch.Tensor:
    """Mask of the k largest |x| in each of `groups` equal slices of the last dimension.

    x: [..., width], bf16, fp16, fp32 or fp64. Returns bool [..., width] with exactly k * groups True per row.
    Raises ValueError where `groups` does not divide the width or k does not fit a slice.
    """
    width = x.shape[-1]
    if groups < 1 or width % groups:
        raise ValueError(f"{groups} groups do not divide {width} features")
    size = width // groups
    if not 1 <= k <= size:
        raise ValueError(f"cannot keep {k} of {size} features")
    if k == size or x.numel() == 0:
        return torch.ones_like(x, dtype=torch.bool)
    grouped = x.detach().reshape(*x.shape[:-1], groups, size)
    if x.dtype == torch.float64:
        return _mask_by_stable_sort(grouped, k).flatten(-2)
    key = _ordering_key(grouped)
    return (key >= _kth_largest(key, k)).flatten(-2)


def block_topk_mask(x: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Mask of the n largest |x| among every m consecutive features (N:M, Block Q-Sparse sec. 2.4); arguments as `topk_mask`."""
    width = x.shape[-1]
    if m < 1 or width % m:
        raise ValueError(f"blocks of {m} do not divide {width} features")
    return topk_mask(x, n, groups=width // m)


def _ordering_key(x: torch.Tensor) -> torch.Tensor:
    """Integers that order like (|x|, lower index first) along the last dimension: int32 for 16-bit floats, else int64."""
    size = x.shape[-1]
    if x.element_size() == 2 and size <= 1 << 16:
        key = x.contiguous().view(torch.int16).to(torch.int32)
        key.bitwise_left_shift_(16).bitwise_and_(0x7FFF0000)
    else:
        bits = torch.int16 if x.element_size() == 2 else torch.int32
        key = x.contiguous().view(bits).to(torch.int64)
        key.bitwise_and_(0x7FFF if x.element_size() == 2 else 0x7FFFFFFF).bitwise_left_shift_(32)
    return key.bitwise_or_(torch.arange(size - 1, -1, -1, dtype=key.dtype, device=x.device))


def _kth_largest(key: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest key of each row, [..., 1]. On a CPU numpy's vectorized quickselect is several times faster than topk."""
    size = key.shape[-1]
    if key.is_cuda:
        return key.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    place = size - k
    return torch.from_numpy(np.partition(key.numpy(), place, axis=-1)[..., place : place + 1])


def _mask_by_stable_sort(x: torch.Tensor, k: int) -> torch.Tensor:
    """The definition itself. Serves fp64, whose magnitude leaves no room for an index in a 64-bit key."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, True)
