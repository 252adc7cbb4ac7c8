"""The shape of a model: what `model.*` of a configuration says, with a preset filling what is left out."""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["relu2_glu", "silu_glu"]


@dataclass(kw_only=True)
class ModelConfig:
    """Llama layout: RMSNorm, RoPE, gated MLP or mixture of experts, no biases. Unset fields come from `preset`."""

    preset: str = "tiny"
    """tiny, 300m, 700m, 1b3 or 7b: the shapes of Q-Sparse's appendix B (tiny is ours). moe_300m_total and moe_300m_active:
    mixtures of experts with as many parameters, and as many activated ones, as 300m."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream, features."""
    ffn_hidden_size: int | None = None
    """Width of the gated MLP, features; gate and up have this many outputs each. With experts: `moe_ffn_hidden_size`."""
    num_attention_heads: int | None = None
    """Query heads; hidden_size / num_attention_heads features each."""
    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); equal to num_attention_heads for plain multi-head attention."""
    activation: Activation | None = None
    """"relu2_glu": up * relu(gate)^2, the paper's. "silu_glu": up * silu(gate), for models that continue a SiLU one."""
    vocab_size: int | None = None
    """Entries of the embedding. Unset: the tokenizer's, rounded up to a multiple of `vocab_multiple`."""
    vocab_multiple: int = 128
    """See `vocab_size`. Part of the model, hence independent of the layout; the tensor-parallel size must divide the vocabulary."""
    tied_embeddings: bool = False
    """Share the weight of embedding and head."""
    rope_base: float = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm, SubLN included."""
    init_std: float = 0.02
    """Standard deviation of initial weights; residual-branch outputs use init_std / sqrt(2 * num_layers)."""
    num_experts: int | None = None
    """Experts of each layer, which replace its MLP; 0 is a dense MLP."""
    moe_router_topk: int = 2
    """Experts that each token is sent to, 1 .. num_experts. The router's softmax is over the chosen ones (over all where this
    is 1)."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert, features. Unset: ffn_hidden_size."""
    moe_shared_expert_ffn_hidden_size: int | None = None
    """Width of a shared expert that every token passes besides, features; 0: none."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the load-balancing loss, >= 0: experts * sum over experts of (fraction of the slots routed to it) * (mean router
    probability of it), for each layer and sequence, summed over the layers and averaged over the sequences. 1 when balanced.
    It is no part of the reported loss."""
