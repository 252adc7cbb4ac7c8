"""Mode "global": the exact K largest |x| of a token whose features are sharded over a process group.

No rank sees the whole token, and gathering it would cost as much as the product it saves. Instead the ranks find the K-th
largest magnitude together, digit by digit (a radix select): a magnitude is its IEEE bit pattern without the sign, read as
an unsigned integer of base-256 digits. Each round counts, among the entries that share the digits found so far, how many
have each value of the next digit; one all-reduce of [tokens, 256] makes the counts global, and they tell the next digit of
the threshold. 16-bit floats need 2 rounds, fp32 4, fp64 8.

Entries above the threshold survive. Of those equal to it the lower global index wins, so one more exchange tells each rank
how many of them live on lower ranks. The result is the mask `ops.topk.topk_mask` would give on the gathered token.
"""

import torch
import torch.distributed as dist

from megatron_qsparse.ops.topk import topk_mask

_DIGIT_BITS = 8
_DIGITS = 1 << _DIGIT_BITS
_CHUNK_ENTRIES = 1 << 20
"""Entries counted at a time: `scatter_add_` wants int64 indices, eight times the size of a bf16 input if done at once."""


def global_topk_mask(x: torch.Tensor, k: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Mask of this rank's share of the k largest |x| of each token.

    x: [..., local width], bf16, fp16, fp32 or fp64; the same shape on every rank of `group`, whose order is that of the
    features. k: entries kept of the full width. Returns bool [..., local width], exactly k True per token over the group.
    A collective call: all ranks make it. Raises ValueError where k does not fit the full width.
    """
    if group.size() == 1:
        return topk_mask(x, k)
    width = x.shape[-1] * group.size()
    if not 1 <= k <= width:
        raise ValueError(f"cannot keep {k} of {width} features")
    if k == width or x.numel() == 0:
        return torch.ones_like(x, dtype=torch.bool)
    magnitude = _magnitude_bits(x).flatten(0, -2) if x.dim() > 1 else _magnitude_bits(x)[None]
    threshold, ties_kept = _global_threshold(magnitude, k, group)
    tie = magnitude == threshold
    position = tie.cumsum(-1, dtype=torch.int32)
    position += _sum_over_lower_ranks(position[:, -1:], group)
    return ((magnitude > threshold) | (tie & (position <= ties_kept))).view(x.shape)


def _magnitude_bits(x: torch.Tensor) -> torch.Tensor:
    """Non-negative integers of x's size that order like |x|."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(integer) & torch.iinfo(integer).max


def _global_threshold(magnitude: torch.Tensor, k: int, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """The k-th largest magnitude of each token over all ranks, and how many entries equal to it are among the k; both [tokens, 1]."""
    tokens = magnitude.shape[0]
    prefix = torch.zeros((tokens, 1), dtype=magnitude.dtype, device=magnitude.device)
    missing = torch.full((tokens, 1), k, dtype=torch.int32, device=magnitude.device)
    for shift in range(8 * magnitude.element_size() - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = _digit_counts(magnitude, prefix, shift)
        dist.all_reduce(counts, group=group)
        at_least = counts.flip(-1).cumsum(-1, dtype=torch.int32)
        place = (at_least < missing).sum(-1, keepdim=True)
        digit = _DIGITS - 1 - place
        missing -= at_least.gather(-1, place) - counts.gather(-1, digit)
        prefix = prefix.bitwise_left_shift(_DIGIT_BITS) | digit.to(prefix.dtype)
    return prefix, missing


def _digit_counts(magnitude: torch.Tensor, prefix: torch.Tensor, shift: int) -> torch.Tensor:
    """int32 [tokens, 256]: of the entries whose digits above `shift` are `prefix`, how many have each digit at `shift`."""
    tokens, width = magnitude.shape
    counts = torch.zeros((tokens, _DIGITS), dtype=torch.int32, device=magnitude.device)
    # In the first round nothing is known yet, and shifting by the whole word is undefined.
    first = shift + _DIGIT_BITS == 8 * magnitude.element_size()
    rows = max(1, _CHUNK_ENTRIES // width)
    for start in range(0, tokens, rows):
        part = magnitude[start : start + rows]
        digit = (part.bitwise_right_shift(shift) & (_DIGITS - 1)).long()
        if first:
            candidate = torch.ones_like(part, dtype=torch.int32)
        else:
            candidate = (part.bitwise_right_shift(shift + _DIGIT_BITS) == prefix[start : start + rows]).int()
        counts[start : start + rows].scatter_add_(-1, digit, candidate)
    return counts


def _sum_over_lower_ranks(count: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    gathered = [torch.empty_like(count, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(gathered, count.contiguous(), group=group)
    return sum(gathered[: group.rank()], start=torch.zeros_like(count))
