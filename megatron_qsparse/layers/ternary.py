"""Ternary codes and alpha of all quantized linears of a model, made once per optimizer step.

alpha is the mean |w| of each LOGICAL matrix (q, k, v, gate, up, o, down; of each expert) over the full tensor: fp64 sums, one
all-reduce per tensor-parallel group for all matrices together. Which rows belong to which matrix:

* qkv: by GLOBAL row; Megatron interleaves [queries of a group, its key, its value] and with fewer key/value heads than ranks
  cuts across them.
* gate_up: by LOCAL half; every rank stores [its gate rows; its up rows].

The optimizer writes weights through `.data`, which moves no version counter, so whoever steps, loads or rolls back must call
`invalidate()`; the next forward refreshes everything. `check()` finds a forgotten call.
"""

from collections.abc import Iterable

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


class TernaryWeight:
    """Codes (int8 [rows, inputs], one buffer for the life of the layer) and alpha ([rows]) of one linear's weight.

    A plain object, no module and no buffers: absent from state dicts, untouched by casts of the model.
    """

    def __init__(self, layer, projection: str):
        self.layer, self.projection = layer, projection
        self.codes: torch.Tensor | None = None
        self.alpha: torch.Tensor | None = None
        self.owner: TernaryWeights | None = None

    def current(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, alpha) of the present weights; refreshes all linears of the model where they are out of date."""
        if self.owner is None:
            raise RuntimeError("a quantized linear was used before TernaryWeights(model) adopted it")
        self.owner.refresh()
        return self.codes, self.alpha

    def local_sums(self) -> torch.Tensor:
        return absolute_sums(self.layer.weight, self._labels, len(self._entries))

    def prepare(self) -> None:
        if self.codes is None or self.codes.device != self.layer.weight.device:
            self.codes = torch.empty_like(self.layer.weight, dtype=torch.int8, requires_grad=False)
            self._labels, entries = logical_rows(self.layer, self.projection)
            self._entries = torch.tensor(entries, dtype=torch.float64, device=self.codes.device)
        self.sums = self.local_sums()

    def quantize(self, sums: torch.Tensor) -> None:
        """Fill codes and alpha from the sums over all ranks, fp64 [matrices]."""
        weight = self.layer.weight
        self.alpha = absmean(sums, self._entries, weight.dtype)[self._labels]
        ternary_codes(weight, self.alpha, out=self.codes)


class TernaryWeights:
    """All ternary weights of a model (or of its local pipeline stage)."""

    def __init__(self, modules: Iterable[torch.nn.Module]):
        self.weights = [m.ternary for m in modules if getattr(m, "ternary", None) is not None]
        for weight in self.weights:
            weight.owner = self
        self.valid = False
        self.refreshes = 0

    def invalidate(self) -> None:
        """The weights were written: the next forward makes new codes."""
        self.valid = False

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring codes and alphas up to date; a no-op while they are."""
        if self.valid:
            return
        by_group: dict[dist.ProcessGroup, list[TernaryWeight]] = {}
        for weight in self.weights:
            weight.prepare()
            by_group.setdefault(weight.layer.tp_group, []).append(weight)
        for group, weights in by_group.items():
            sums = torch.cat([weight.sums for weight in weights])
            if group.size() > 1:
                dist.all_reduce(sums, group=group)
            for weight, total in zip(weights, sums.split([len(w.sums) for w in weights]), strict=True):
                weight.quantize(total)
        self.valid, self.refreshes = True, self.refreshes + 1

    @torch.no_grad()
    def check(self) -> None:
        """Raise RuntimeError where a weight was written after its codes were made. Local: compares fp64 sums of |w| bit for bit."""
        for weight in self.weights if self.valid else ():
            if not torch.equal(weight.local_sums(), weight.sums):
                where = weight.layer.settings.name + ("" if weight.layer.expert is None else f", expert {weight.layer.expert}")
                raise RuntimeError(f"{where}: its ternary codes are stale; invalidate() was not called after a write")
