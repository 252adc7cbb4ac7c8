"""Measured use of experts: how many tokens each one got, how sparse its inputs were, and the load-balancing loss."""

from collections.abc import Iterable

import torch
import torch.distributed as dist

EXPERT_PROJECTIONS = ("mlp.gate_up", "mlp.down")


class RoutingMeter:
    """Counts of one router; idle unless switched on."""

    def __init__(self):
        self.active = False
        self.tokens: torch.Tensor | None = None
        """int64 [experts]: token slots routed to each expert."""
        self.loss: torch.Tensor | None = None
        """fp64 [2]: sum of the observed losses, their number."""

    @torch.no_grad()
    def observe_routes(self, routing_map: torch.Tensor) -> None:
        """routing_map: bool [tokens, experts]."""
        if self.active:
            tokens = routing_map.sum(dim=0)
            self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def observe_loss(self, loss: torch.Tensor) -> None:
        """loss: [] or [1], this rank's part of a micro-batch's load-balancing loss, without its coefficient."""
        if self.active:
            entry = torch.stack([loss.double().reshape(()), torch.ones((), dtype=torch.float64, device=loss.device)])
            self.loss = entry if self.loss is None else self.loss + entry


class ExpertMeters:
    """The meters of all routers and experts of the local model. The sparsity of an expert's inputs is read from the meters of
    its linears, which `layers.meter.SparsityMeters` switches on and off: start both, and stop both.

    num_layers, num_experts: of the whole model. tensor_parallel: ranks that each see a part of a micro-batch's tokens.
    """

    def __init__(self, modules: Iterable[torch.nn.Module], num_layers: int, num_experts: int, tensor_parallel: int, device: torch.device):
        modules = list(modules)
        self.routers = [m for m in modules if isinstance(getattr(m, "meter", None), RoutingMeter)]
        self.linears = [m for m in modules if getattr(m, "expert", None) is not None]
        self.num_layers, self.num_experts, self.tensor_parallel, self.device = num_layers, num_experts, tensor_parallel, device

    def start(self) -> None:
        """Count from zero during the coming training forwards."""
        for router in self.routers:
            router.meter.active, router.meter.tokens, router.meter.loss = True, None, None

    def stop(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Stop counting. Metrics over all tokens of `group` (None: the whole world); two all-reduces.

        moe/aux_loss: mean load-balancing loss of layers and sequences; 1 is perfect balance.
        moe/load_max, moe/load_min: the largest and smallest fraction of its layer's token slots that any expert got;
        moe/layers.<i>/load_max and load_min: of one layer.
        experts/layers.<i>.<e>/load, .../sparsity.mlp.gate_up and .../sparsity.mlp.down: of every expert; sparsity is the
        fraction of zeros in what was multiplied, and left out for an expert without tokens.
        """
        tokens = torch.zeros(self.num_layers, self.num_experts, dtype=torch.int64, device=self.device)
        counts = torch.zeros(self.num_layers, self.num_experts, len(EXPERT_PROJECTIONS), 2, dtype=torch.int64, device=self.device)
        losses = torch.zeros(2, dtype=torch.float64, device=self.device)
        for router in self.routers:
            router.meter.active = False
            if router.meter.tokens is not None:
                tokens[router.layer_number - 1] += router.meter.tokens
            if router.meter.loss is not None:
                losses += router.meter.loss
        for linear in self.linears:
            if linear.meter.counts is not None:
                layer = int(linear.settings.name.split(".")[1])
                counts[layer, linear.expert, EXPERT_PROJECTIONS.index(linear.settings.projection)] += linear.meter.counts
        table = torch.cat([tokens.flatten(), counts.flatten()])
        if dist.is_initialized():
            dist.all_reduce(table, group=group)
            dist.all_reduce(losses, group=group)
        tokens, counts = table[: tokens.numel()].view_as(tokens), table[tokens.numel() :].view_as(counts)
        if not tokens.any():
            return {}
        return {**self._loss(losses), **self._loads(tokens), **self._sparsities(counts)}

    def _loss(self, losses: torch.Tensor) -> dict[str, float]:
        total, observed = losses.tolist()
        # The tensor-parallel ranks' parts of one micro-batch add up to its loss.
        return {"moe/aux_loss": total / (observed / self.tensor_parallel)} if observed else {}

    def _loads(self, tokens: torch.Tensor) -> dict[str, float]:
        load = (tokens.double() / tokens.sum(dim=1, keepdim=True)).tolist()
        metrics = {"moe/load_max": max(map(max, load)), "moe/load_min": min(map(min, load))}
        for layer, row in enumerate(load):
            metrics |= {f"moe/layers.{layer}/load_max": max(row), f"moe/layers.{layer}/load_min": min(row)}
            metrics |= {f"experts/layers.{layer}.{expert}/load": value for expert, value in enumerate(row)}
        return metrics

    def _sparsities(self, counts: torch.Tensor) -> dict[str, float]:
        return {
            f"experts/layers.{layer}.{expert}/sparsity.{name}": 1 - nonzero / entries
            for layer, experts in enumerate(counts.tolist())
            for expert, projections in enumerate(experts)
            for name, (nonzero, entries) in zip(EXPERT_PROJECTIONS, projections, strict=True)
            if entries
        }
