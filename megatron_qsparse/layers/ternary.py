"""Ternary codes and alpha of all quantized linears of a model, made once per optimizer step.

alpha is the mean |w| of each LOGICAL matrix (q, k, v, gate, up, o, down; of each expert) over the full tensor: fp64 sums, one
all-reduce per tensor-parallel group for all matrices together. Which rows belong to which matrix:

* qkv: by GLOBAL row; Megatron interleaves [queries of a group, its key, its value] and with fewer key/value heads than ranks
  cuts across them.
* gate_up: by LOCAL half; every rank stores [its gate rows; its up rows].

The optimizer writes weights through `.data`, which moves no version counter, so whoever steps, loads or rolls back must call
`invalidate()`; the next forward refreshes everything. `check()` finds a forgotten call.

Weights that are empty most of the time (ZeRO-3) keep their alpha only: a code buffer would undo the sharding. `CodeLinear`
makes the codes again from the weight that is whole for its forward and for its backward.
"""

import contextlib
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from megatron_qsparse.ops.quantize import absmean, absolute_sums, ternary_codes


def logical_rows(layer, projection: str) -> tuple[torch.Tensor, list[int]]:
    """(label of each local output row, int64 [rows]; entries of each logical matrix over all ranks)."""
    rows, device = layer.weight.shape[0], layer.weight.device
    if projection == "attention.qkv":
        config = layer.config
        queries = config.num_attention_heads // config.num_query_groups
        row = torch.arange(rows, device=device) + layer.tp_group.rank() * rows
        slot = (row // config.kv_channels) % (queries + 2)
        entries = layer.output_size // (queries + 2) * layer.input_size
        return (slot - (queries - 1)).clamp_(min=0), [entries * queries, entries, entries]
    if projection in ("mlp.gate_up", "mlp.shared_gate_up"):
        labels = (torch.arange(rows, device=device) >= rows // 2).long()
        return labels, [layer.output_size // 2 * layer.input_size] * 2
    return torch.zeros(rows, dtype=torch.long, device=device), [layer.output_size * layer.input_size]


Gathered = Callable[[list[torch.nn.Parameter]], contextlib.AbstractContextManager]
"""A context inside which these parameters are whole; entering it may be a collective call."""


class TernaryWeight:
    """Codes (int8 [rows, inputs], one buffer for the life of the layer) and alpha ([rows]) of one linear's weight.

    A plain object, no module and no buffers: absent from state dicts, untouched by casts of the model.
    """

    def __init__(self, layer, projection: str):
        self.layer, self.projection = layer, projection
        self.codes: torch.Tensor | None = None
        self.alpha: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None
        """This rank's sums of |w| of the last refresh, fp64 [matrices]."""
        self._labels: torch.Tensor | None = None
        self.owner: TernaryWeights | None = None

    def current(self) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(codes or None where they are not kept, alpha) of the present weights; refreshes all linears where out of date."""
        if self.owner is None:
            raise RuntimeError("a quantized linear was used before TernaryWeights(model) adopted it")
        if not self.owner.keeps_codes and not self.owner.valid:
            raise RuntimeError("TernaryWeights.refresh() must come before the forward: inside it other layers' weights are empty")
        self.owner.refresh()
        return self.codes, self.alpha

    def local_sums(self) -> torch.Tensor:
        return absolute_sums(self.layer.weight, self._labels, len(self._entries))

    def measure(self) -> None:
        """Take this rank's sums of the weight, which must be whole."""
        weight = self.layer.weight
        if self._labels is None or self._labels.device != weight.device:
            self._labels, entries = logical_rows(self.layer, self.projection)
            self._entries = torch.tensor(entries, dtype=torch.float64, device=weight.device)
        self.sums = self.local_sums()

    def set_alpha(self, sums: torch.Tensor) -> None:
        """From the sums over all ranks, fp64 [matrices]."""
        self.alpha = absmean(sums, self._entries, self.layer.weight.dtype)[self._labels]

    def quantize(self) -> None:
        """Fill the code buffer; the weight must be whole."""
        weight = self.layer.weight
        if self.codes is None or self.codes.device != weight.device:
            self.codes = torch.empty_like(weight, dtype=torch.int8, requires_grad=False)
        ternary_codes(weight, self.alpha, out=self.codes)


class TernaryWeights:
    """All ternary weights of a model (or of its local pipeline stage).

    gathered: for weights that are whole only inside this context; None for weights that always are. With it no codes are kept,
    and `refresh` and `check` gather one weight at a time: all ranks that share a weight must call them together, and
    `refresh` before the forward.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], gathered: Gathered | None = None):
        self.weights = [m.ternary for m in modules if getattr(m, "ternary", None) is not None]
        for weight in self.weights:
            weight.owner = self
        self.keeps_codes = gathered is None
        self._gathered = gathered or (lambda params: contextlib.nullcontext())
        self.valid = False
        self.refreshes = 0

    def invalidate(self) -> None:
        """The weights were written: the next forward makes new codes."""
        self.valid = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring alphas and, where they are kept, codes up to date; a no-op while they are."""
        if self.valid:
            return
        by_group: dict[dist.ProcessGroup, list[TernaryWeight]] = {}
        for weight in self.weights:
            with self._gathered([weight.layer.weight]):
                weight.measure()
            by_group.setdefault(weight.layer.tp_group, []).append(weight)
        for group, weights in by_group.items():
            sums = torch.cat([weight.sums for weight in weights])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            for weight, total in zip(weights, sums.split([len(w.sums) for w in weights]), strict=True):
                weight.set_alpha(total)
                if self.keeps_codes:
                    weight.quantize()
        self.valid, self.refreshes = True, self.refreshes + 1

    @torch.no_grad()
    def check(self) -> None:
        """Raise RuntimeError where a weight was written after its codes were made: compares local fp64 sums of |w| bit for bit."""
        for weight in self.weights if self.valid else ():
            with self._gathered([weight.layer.weight]):
                sums = weight.local_sums()
            if not torch.equal(sums, weight.sums):
                where = weight.layer.settings.name + ("" if weight.layer.expert is None else f", expert {weight.layer.expert}")
                raise RuntimeError(f"{where}: its ternary codes are stale; invalidate() was not called after a write")
