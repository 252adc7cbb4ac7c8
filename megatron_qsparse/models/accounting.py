"""What a model costs, by arithmetic alone: parameters, activated parameters, FLOPs per token. Memory is in memory.py.

No torch in here, so that a plan is printed at once. Every function takes a resolved `ModelConfig` (`presets.apply_preset`)
and raises ValueError for one with unset fields.

The unit of sparsity is the projection: one fused linear of a layer and the input it multiplies (`config.PROJECTIONS`); the
experts of a layer share their two. "Activated" always means: of the projections' weights that a token passes, the columns
that meet a non-zero input; of a mixture of experts a token passes the chosen ones, the shared one and the router.
"""

from dataclasses import dataclass

from megatron_qsparse.config import PROJECTIONS, ROW_PROJECTIONS, SHARED_PROJECTIONS, BitNetConfig, QSparseConfig, resolve
from megatron_qsparse.models.config import ModelConfig


def projection_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each projection of one layer, over all tensor-parallel ranks; of one expert where there are several."""
    _require_resolved(model)
    hidden, ffn = model.hidden_size, model.moe_ffn_hidden_size if model.num_experts else model.ffn_hidden_size
    key_value = hidden // model.num_attention_heads * model.num_query_groups
    shapes = {
        "attention.qkv": (hidden + 2 * key_value, hidden),
        "attention.proj": (hidden, hidden),
        "mlp.gate_up": (2 * ffn, hidden),
        "mlp.down": (hidden, ffn),
    }
    if shared := model.moe_shared_expert_ffn_hidden_size:
        shapes |= {"mlp.shared_gate_up": (2 * shared, hidden), "mlp.shared_down": (hidden, shared)}
    return shapes


def expert_copies(model: ModelConfig, projection: str) -> int:
    """How many experts of a layer have this projection; 1 for what is not in an expert."""
    return model.num_experts if model.num_experts and projection in ("mlp.gate_up", "mlp.down") else 1


def copies_per_token(model: ModelConfig, projection: str) -> int:
    """How many of them one token passes."""
    return model.moe_router_topk if expert_copies(model, projection) > 1 else 1


def projection_widths(model: ModelConfig) -> dict[str, int]:
    """Full input width of each projection, features."""
    return {name: inputs for name, (_, inputs) in projection_shapes(model).items()}


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model, by where they are."""

    embedding: int
    head: int
    """0 where the head is tied to the embedding."""
    projections: dict[str, int]
    """Summed over the layers and experts."""
    norms: int
    subln: int
    router: int = 0
    """Of all layers; dense and never quantized."""

    @property
    def linear(self) -> int:
        """The non-embedding linears: what can be sparse or ternary, and what the papers call the model's size."""
        return sum(self.projections.values())

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.linear + self.norms + self.subln + self.router


def parameters(model: ModelConfig, subln: bool = False) -> ParameterCount:
    """Parameters by kind; subln: whether `bitnet.subln` adds its norms before attention.proj and each (expert's) mlp.down."""
    layers, hidden = model.num_layers, model.hidden_size
    shapes = projection_shapes(model)
    return ParameterCount(
        embedding=model.vocab_size * hidden,
        head=0 if model.tied_embeddings else model.vocab_size * hidden,
        projections={name: layers * expert_copies(model, name) * outputs * inputs for name, (outputs, inputs) in shapes.items()},
        norms=(2 * layers + 1) * hidden,
        subln=layers * sum(expert_copies(model, name) * shapes[name][1] for name in shapes if name in ROW_PROJECTIONS) if subln else 0,
        router=layers * model.num_experts * hidden,
    )


@dataclass(frozen=True)
class ActivatedParameters:
    """Non-embedding linears whose input feature is not zero, for one token."""

    by_projection: dict[str, float]
    linear: int
    """The linears that the token passes, counted whole."""
    router: int = 0

    @property
    def total(self) -> int:
        return round(sum(self.by_projection.values())) + self.router

    @property
    def sparsity(self) -> float:
        """Overall: the fraction of `linear` that is skipped. Experts that the token does not pass are no part of it."""
        return 1 - sum(self.by_projection.values()) / self.linear


def activated_parameters(model: ModelConfig, sparsity_by_projection: dict[str, float]) -> ActivatedParameters:
    """Sum over the non-embedding linears that a token passes of parameters * fraction of non-zero inputs, as in Q-Sparse's Table 2.

    sparsity_by_projection: fraction of zeros in the input of each projection, in [0, 1], averaged over tokens and layers;
    a projection that is not named is dense and counted whole. The router is dense. Embedding, head and norms are not counted.
    Raises ValueError for an unknown projection or a fraction outside [0, 1].
    """
    density = _densities(sparsity_by_projection)
    count = parameters(model)
    passed = {name: n // expert_copies(model, name) * copies_per_token(model, name) for name, n in count.projections.items()}
    return ActivatedParameters({name: density[name] * n for name, n in passed.items()}, sum(passed.values()), count.router)


def expected_sparsity(model: ModelConfig, qsparse: QSparseConfig) -> dict[str, float]:
    """Fraction of inputs that top-K sets to zero, by projection: 1 - K * groups / width, averaged over the layers.

    A lower bound of what is measured: ReLU^2 makes more zeros at the input of mlp.down, int8 rounding makes some everywhere,
    and top-K may keep them.
    """
    layers = model.num_layers
    result = {}
    for projection, width in projection_widths(model).items():
        settings = [resolve(layer, layers, projection, width, qsparse, BitNetConfig()) for layer in range(layers)]
        result[projection] = 1 - sum(s.k(width) * s.groups for s in settings) / (layers * width)
    return result


@dataclass(frozen=True)
class Flops:
    """Floating-point operations (a multiply-add is two) for one token."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def flops_per_token(model: ModelConfig, sequence_length: int) -> Flops:
    """Dense training FLOPs: 6 per weight of the projections that a token passes, router and head, plus causal attention.

    Attention multiplies each query with the (sequence_length + 1) / 2 keys and values it sees on average: 4 * hidden_size
    operations per pair and layer, twice that in the backward. Recomputation, norms, activations and the embedding look-up
    are not counted.
    """
    return activated_flops_per_token(model, sequence_length, {})


def activated_flops_per_token(model: ModelConfig, sequence_length: int, sparsity_by_projection: dict[str, float]) -> Flops:
    """Training FLOPs that remain when every multiplication by a zero input is skipped.

    Of a projection with N weights and a fraction d of non-zero inputs, these are: forward Y = X W^T, 2Nd; weight gradient
    dY^T X, 2Nd, since it uses the same sparse X; input gradient dY W, 2N, since the straight-through estimator makes it
    dense (Q-Sparse sec. 2.3). Router, head and attention are dense. `forward` is what an inference engine that skips zeros
    computes for a token. Arguments and errors as in `activated_parameters`.
    """
    activated = activated_parameters(model, sparsity_by_projection)
    nonzero = sum(activated.by_projection.values())
    head = 2 * (model.vocab_size * model.hidden_size + activated.router)
    attention = model.num_layers * 4 * model.hidden_size * (sequence_length + 1) / 2
    return Flops(2 * nonzero + head + attention, 2 * nonzero + 2 * activated.linear + 2 * head + 2 * attention)


def _densities(sparsity_by_projection: dict[str, float]) -> dict[str, float]:
    names = (*PROJECTIONS, *SHARED_PROJECTIONS)
    for name, sparsity in sparsity_by_projection.items():
        if name not in names:
            raise ValueError(f"{name!r} is no projection; they are {', '.join(names)}")
        if not 0 <= sparsity <= 1:
            raise ValueError(f"the sparsity of {name} is a fraction of zeros in [0, 1], not {sparsity}")
    return {name: 1 - sparsity_by_projection.get(name, 0.0) for name in names}


def _require_resolved(model: ModelConfig) -> None:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size", "num_experts")
    unset = [name for name in names if getattr(model, name) is None]
    if unset:
        raise ValueError(f"model.{unset[0]} is not set: fill the model with presets.apply_preset first")
