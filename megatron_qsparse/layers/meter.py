"""Measured sparsity: the fraction of zeros in what a projection really multiplies.

The setting says how many entries survive the mask; relu^2 adds zeros of its own before the down projection and rounding to
int8 adds more, so runs report what was counted. For a quantized linear the codes are counted, otherwise the sparse input.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megatron_qsparse.config import PROJECTIONS, SHARED_PROJECTIONS

_ROWS = (*PROJECTIONS, *SHARED_PROJECTIONS)


class SparsityMeter:
    """Counts of one linear; idle unless switched on, since counting reads the operand once more."""

    def __init__(self):
        self.active = False
        self.counts: torch.Tensor | None = None

    @torch.no_grad()
    def observe(self, operand: torch.Tensor) -> None:
        """operand: [..., local width], any dtype; adds (non-zero entries, entries)."""
        if not self.active:
            return
        nonzero = operand.count_nonzero()
        counts = torch.stack([nonzero, torch.full_like(nonzero, operand.numel())])
        self.counts = counts if self.counts is None else self.counts + counts


class SparsityMeters:
    """The meters of all linears of the local model."""

    def __init__(self, modules: Iterable[torch.nn.Module], device: torch.device):
        self.linears = [m for m in modules if isinstance(getattr(m, "meter", None), SparsityMeter)]
        self.device = device

    def start(self) -> None:
        """Count from zero during the coming forwards."""
        for linear in self.linears:
            linear.meter.active, linear.meter.counts = True, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside are not counted: validation is not training."""
        active = [linear.meter.active for linear in self.linears]
        for linear in self.linears:
            linear.meter.active = False
        try:
            yield
        finally:
            for linear, was in zip(self.linears, active, strict=True):
                linear.meter.active = was

    def stop(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Stop counting. Fraction of zeros by projection name, over all layers, experts and tokens of `group` (None: the whole world).

        One all-reduce. Projections that no rank has seen are left out.
        """
        totals = torch.zeros(len(_ROWS), 2, dtype=torch.int64, device=self.device)
        for linear in self.linears:
            if linear.meter.counts is not None:
                totals[_ROWS.index(linear.settings.projection)] += linear.meter.counts
            linear.meter.active = False
        if dist.is_initialized():
            dist.all_reduce(totals, group=group)
        return {name: 1 - nonzero / entries for name, (nonzero, entries) in zip(_ROWS, totals.tolist(), strict=True) if entries}
