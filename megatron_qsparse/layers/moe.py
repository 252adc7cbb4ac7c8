"""Mixture of experts: Megatron's layer, router and dispatchers, with sparse linears inside every expert and the shared expert.

The router stays dense; its logits are computed in fp32. An expert is a gated MLP whose tokens arrive sorted by the
dispatcher. The router's probability multiplies each token before mlp.down, a positive factor that changes a mask only where
rounding makes a tie; behind mlp.down where SubLN would divide it out. Top-K, int8 scales, SubLN and ternary alphas act within
one expert, over the expert tensor-parallel ranks.
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_qsparse.layers.expert_meter import RoutingMeter


class MeteredRouter(TopKRouter):
    """Megatron's top-k router, which also counts where it sends tokens.

    input [sequence, batch, hidden_size] -> (probabilities [tokens, experts], routing map bool [tokens, experts]).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.meter = RoutingMeter()

    def routing(self, logits, *args, **kwargs):
        probabilities, routing_map = super().routing(logits, *args, **kwargs)
        if self.training:
            self.meter.observe_routes(routing_map)
        return probabilities, routing_map

    def attach_and_log_load_balancing_loss(self, activation, aux_loss_coeff, aux_loss, *args, **kwargs):
        """Megatron logs into one table of the whole process, whose size is that of the first model; this meter takes its place."""
        self.meter.observe_loss(aux_loss.detach() / aux_loss_coeff)
        return MoEAuxLossAutoScaler.apply(activation, aux_loss)


class SparseExperts(SequentialMLP):
    """Megatron's list of local experts, whose linears know their expert's number among all of the layer."""

    def __init__(self, num_local_experts, *args, **kwargs):
        super().__init__(num_local_experts, *args, **kwargs)
        first = self.ep_group.rank() * num_local_experts
        for number, expert in enumerate(self.local_experts, start=first):
            expert.linear_fc1.expert = expert.linear_fc2.expert = number
        self.weigh_outputs = self.local_experts[0].linear_fc2.sub_norm is not None

    def forward(self, hidden_states, tokens_per_expert, probabilities):
        """hidden_states [tokens, hidden], those of one expert after those of another, tokens_per_expert int [local experts],
        probabilities [tokens] -> (output [tokens, hidden], None).

        A normalized input of mlp.down is the same for every probability: the experts would be summed unweighted, and the router
        learn from its load-balancing loss alone. mlp.down is linear, so its output takes the factor.
        """
        if not self.weigh_outputs:
            return super().forward(hidden_states, tokens_per_expert, probabilities)
        output, bias = super().forward(hidden_states, tokens_per_expert, torch.ones_like(probabilities, dtype=hidden_states.dtype))
        return (output * probabilities.unsqueeze(-1)).to(output.dtype), bias


def moe_spec(linear: Callable[[str], ModuleSpec], shared: bool) -> ModuleSpec:
    """What stands in a layer's MLP slot. linear: the spec of a projection by its name; shared: with a shared expert."""
    experts = ModuleSpec(module=SparseExperts, submodules=MLPSubmodules(linear_fc1=linear("mlp.gate_up"), linear_fc2=linear("mlp.down")))
    shared_expert = None
    if shared:
        submodules = MLPSubmodules(linear_fc1=linear("mlp.shared_gate_up"), linear_fc2=linear("mlp.shared_down"))
        shared_expert = ModuleSpec(module=SharedExpertMLP, submodules=submodules)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared_expert, router=MeteredRouter))


def expert_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Parameters that only some data-parallel ranks hold: those of experts spread over more than one expert-parallel rank."""
    return [param for param in model.parameters() if not getattr(param, "allreduce", True)]
