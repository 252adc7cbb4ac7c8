"""What a model costs, by arithmetic alone: parameters, activated parameters, FLOPs per token, memory per rank.

No torch in here, so that a plan is printed at once. Every function takes a resolved `ModelConfig` (`presets.apply_preset`)
and raises ValueError for one with unset fields.

The unit of sparsity is the projection: one fused linear of a layer and the input it multiplies (`config.PROJECTIONS`); the
experts of a layer share their two. "Activated" always means: of the projections' weights that a token passes, the columns
that meet a non-zero input; of a mixture of experts a token passes the chosen ones, the shared one and the router.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_qsparse.config import PROJECTIONS, ROW_PROJECTIONS, SHARED_PROJECTIONS, BitNetConfig, QSparseConfig, resolve
from megatron_qsparse.models.config import ModelConfig

Precision = Literal["bf16", "fp16", "fp32"]
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
OPTIMIZER_BYTES = 12
"""Per parameter: fp32 master weight and Adam's two moments. DeepSpeed keeps the master copy in fp32 training as well."""

GATHERED_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps at most about so many elements of gathered weights whole at a time; DeepSpeed's own default."""


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


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    codes: float
    gathered: float
    """Weights that ZeRO-3 makes whole for the modules at work, besides this rank's shares of them."""
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.codes + self.gathered + self.activations


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over ranks, as far as memory is concerned."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline stage."""
    sequence: bool = False
    """Sequence parallelism: shards what is otherwise whole on each tensor-parallel rank."""
    expert: int = 1
    """Expert-parallel ranks, which divide `data`. Experts' optimizer states are sharded over data / expert ranks."""
    zero_stage: int = 1
    """1 shards optimizer states over the data-parallel ranks, 2 gradients as well, 3 weights as well."""


def memory_per_rank(
    model: ModelConfig, layout: Layout, qsparse: QSparseConfig, bitnet: BitNetConfig,
    precision: Precision, micro_batch_size: int, sequence_length: int,
) -> Memory:  # fmt: skip
    """Memory of the rank that needs most, which is on the first or the last pipeline stage.

    weights: in `precision`. gradients: fp32 accumulation buffers. optimizer: `OPTIMIZER_BYTES`. codes: one byte for each
    parameter of a quantized projection, none with ZeRO-3, which makes them anew at each use. activations: an estimate of what
    autograd keeps, without recomputation, allocator slack or communication buffers; stage s of p holds p - s micro-batches (1F1B),
    and with v chunks a stage those of (v - 1)p + 2(p - s - 1) + 1 chunks. Experts are taken as equally loaded.
    Raises ValueError where the layers do not divide among the stages and chunks or the ZeRO stage is not 1, 2 or 3.
    """
    if layout.zero_stage not in (1, 2, 3):
        raise ValueError(f"zero.stage={layout.zero_stage}: memory is known for stages 1, 2 and 3")
    if model.num_layers % (layout.pipeline * layout.virtual_pipeline):
        raise ValueError(f"model.num_layers={model.num_layers} is not divisible by parallel.pipeline={layout.pipeline} * "
                         f"parallel.virtual_pipeline={layout.virtual_pipeline}")  # fmt: skip
    stages = {0, layout.pipeline - 1}
    return max(
        (_stage_memory(s, model, layout, qsparse, bitnet, precision, micro_batch_size * sequence_length) for s in stages),
        key=lambda memory: memory.total,
    )


def checkpoint_bytes(model: ModelConfig, precision: Precision, subln: bool = False, weights_only: bool = False) -> int:
    """Size of one checkpoint, the weights and the optimizer state, or of a milestone, the weights; without file overhead."""
    return parameters(model, subln).total * (ELEMENT_BYTES[precision] + (0 if weights_only else OPTIMIZER_BYTES))


def _stage_memory(
    stage: int, model: ModelConfig, layout: Layout, qsparse: QSparseConfig, bitnet: BitNetConfig, precision: Precision, tokens: int
) -> Memory:
    shapes = projection_shapes(model)
    per_stage, chunks = model.num_layers // layout.pipeline, layout.virtual_pipeline
    per_chunk = per_stage // chunks
    first, last = stage == 0, stage == layout.pipeline - 1
    element = ELEMENT_BYTES[precision]
    matrices, experts = _layer_matrices(model, shapes, layout)
    held, held_experts = per_stage * matrices, per_stage * experts
    codes = activations = 0
    starts = [(chunk * layout.pipeline + stage) * per_chunk for chunk in range(chunks)]
    for layer in (start + i for start in starts for i in range(per_chunk)):
        settings = {n: resolve(layer, model.num_layers, n, inputs, qsparse, bitnet) for n, (_, inputs) in shapes.items()}
        codes += sum(_held_here(model, name, shapes, layout) for name in shapes if settings[name].quantized)
        activations += _layer_activation_bytes(model, layout, settings, precision)
        held += 2 * model.hidden_size
        for name in (n for n in shapes if settings[n].subln):
            width = shapes[name][1] * expert_copies(model, name) / layout.tensor
            if expert_copies(model, name) > 1:
                held_experts += width / layout.expert
            else:
                held += width
    # A tied head on its own stage still holds a copy of the embedding.
    tables = first + last if not (model.tied_embeddings and layout.pipeline == 1) else 1
    held += tables * model.vocab_size * model.hidden_size / layout.tensor + last * model.hidden_size
    in_flight = layout.pipeline - stage
    if chunks > 1:
        in_flight = ((chunks - 1) * layout.pipeline + 2 * (layout.pipeline - stage - 1) + 1) / chunks
    # Vocabulary-parallel cross entropy keeps the logits in `precision` and their exponentials in fp32.
    logits = last * model.vocab_size / layout.tensor * (element + 4)
    partitioned = layout.zero_stage == 3
    sharded = held / layout.data + held_experts / (layout.data / layout.expert)
    return Memory(
        weights=(sharded if partitioned else held + held_experts) * element,
        gradients=4 * (sharded if layout.zero_stage >= 2 else held + held_experts),
        optimizer=sharded * OPTIMIZER_BYTES,
        codes=0 if partitioned else codes,
        gathered=min(held + held_experts, GATHERED_ELEMENTS) * element if partitioned else 0,
        activations=tokens * (in_flight * activations + logits),
    )


def _held_here(model: ModelConfig, projection: str, shapes: dict, layout: Layout) -> float:
    """Weights of one layer's projection on one rank."""
    outputs, inputs = shapes[projection]
    copies = expert_copies(model, projection)
    return outputs * inputs * copies / layout.tensor / (layout.expert if copies > 1 else 1)


def _layer_matrices(model: ModelConfig, shapes: dict, layout: Layout) -> tuple[float, float]:
    """(weights of one layer's matrices on one rank outside of experts, and in experts)."""
    held = {name: _held_here(model, name, shapes, layout) for name in shapes}
    experts = sum(n for name, n in held.items() if expert_copies(model, name) > 1)
    return sum(held.values()) - experts + model.num_experts * model.hidden_size, experts


def _layer_activation_bytes(model: ModelConfig, layout: Layout, settings: dict, precision: Precision) -> float:
    """Bytes that one layer keeps per token for its backward."""
    element = ELEMENT_BYTES[precision]
    hidden = model.hidden_size
    whole = layout.tensor if layout.sequence else 1
    # Codes are one byte; a dense or masked input is kept as it is.
    operand = {name: 1 if s.quantized else element for name, s in settings.items()}
    kept = 2 * hidden * element / whole
    kept += hidden * operand["attention.qkv"] / whole
    sharded = projection_shapes(model)["attention.qkv"][0] * element + 4 * model.num_attention_heads
    # Attention keeps its output; a projection that changes it (mask, codes) keeps its own operand besides.
    sharded += hidden * element
    if settings["attention.proj"].sparse or settings["attention.proj"].quantized:
        sharded += hidden * operand["attention.proj"]
    if settings["attention.proj"].subln:
        sharded += hidden * element
    for name in ("mlp.", "mlp.shared_"):
        if f"{name}down" not in settings:
            continue
        chosen, expert = copies_per_token(model, f"{name}down"), expert_copies(model, f"{name}down") > 1
        ffn = projection_shapes(model)[f"{name}down"][1]
        # An expert's input is whole on every tensor-parallel rank: the dispatcher gathers it.
        kept += chosen * hidden * operand[f"{name}gate_up"] / (1 if expert else whole)
        # gate and up, relu(gate) and its square (or the SiLU), then the operand of down.
        sharded += chosen * (4 * ffn * element + ffn * operand[f"{name}down"])
        if settings[f"{name}down"].subln:
            sharded += chosen * ffn * element
    if model.num_experts:
        # The router's input, and its logits, scores and probabilities in fp32.
        kept += (hidden * element + 3 * 4 * model.num_experts) / whole
    return kept + sharded / layout.tensor


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
