"""What a model costs, by arithmetic alone: parameters, activated parameters, FLOPs per token, memory per rank.

No torch in here, so that a plan is printed at once. Every function takes a resolved `ModelConfig` (`presets.apply_preset`)
and raises ValueError for one with unset fields or with experts, whose counts depend on the router.

The unit of sparsity is the projection: one fused linear of a layer and the input it multiplies (`config.PROJECTIONS`).
"Activated" always means: of the projections' weights, the columns that meet a non-zero input.
"""

from dataclasses import dataclass
from typing import Literal

from megatron_qsparse.config import PROJECTIONS, BitNetConfig, QSparseConfig, resolve
from megatron_qsparse.models.config import ModelConfig

Precision = Literal["bf16", "fp16", "fp32"]
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
OPTIMIZER_BYTES = 12
"""Per parameter: fp32 master weight and Adam's two moments. DeepSpeed keeps the master copy in fp32 training as well."""

GATHERED_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps at most about so many elements of gathered weights whole at a time; DeepSpeed's own default."""


def projection_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each projection of one layer, over all tensor-parallel ranks."""
    _require_dense(model)
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    key_value = hidden // model.num_attention_heads * model.num_query_groups
    return {
        "attention.qkv": (hidden + 2 * key_value, hidden),
        "attention.proj": (hidden, hidden),
        "mlp.gate_up": (2 * ffn, hidden),
        "mlp.down": (hidden, ffn),
    }


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
    """Summed over the layers."""
    norms: int
    subln: int

    @property
    def linear(self) -> int:
        """The non-embedding linears: what can be sparse or ternary, and what the papers call the model's size."""
        return sum(self.projections.values())

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.linear + self.norms + self.subln


def parameters(model: ModelConfig, subln: bool = False) -> ParameterCount:
    """Parameters by kind; subln: whether `bitnet.subln` adds its two norms a layer."""
    layers, hidden = model.num_layers, model.hidden_size
    shapes = projection_shapes(model)
    return ParameterCount(
        embedding=model.vocab_size * hidden,
        head=0 if model.tied_embeddings else model.vocab_size * hidden,
        projections={name: layers * outputs * inputs for name, (outputs, inputs) in shapes.items()},
        norms=(2 * layers + 1) * hidden,
        subln=layers * (hidden + model.ffn_hidden_size) if subln else 0,
    )


@dataclass(frozen=True)
class ActivatedParameters:
    """Non-embedding linears whose input feature is not zero, for one token."""

    by_projection: dict[str, float]
    linear: int
    """The same linears, all counted."""

    @property
    def total(self) -> int:
        return round(sum(self.by_projection.values()))

    @property
    def sparsity(self) -> float:
        """Overall: the fraction of the linears' parameters that is skipped."""
        return 1 - sum(self.by_projection.values()) / self.linear


def activated_parameters(model: ModelConfig, sparsity_by_projection: dict[str, float]) -> ActivatedParameters:
    """Sum over the non-embedding linears of parameters * fraction of non-zero inputs, as in Q-Sparse's Table 2.

    sparsity_by_projection: fraction of zeros in the input of each projection, in [0, 1], averaged over tokens and layers;
    a projection that is not named is dense and counted whole. Embedding, head and norms are not counted at all.
    Raises ValueError for an unknown projection or a fraction outside [0, 1].
    """
    density = _densities(sparsity_by_projection)
    count = parameters(model)
    return ActivatedParameters({name: density[name] * n for name, n in count.projections.items()}, count.linear)


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
    """Dense training FLOPs: 6 per weight of projections and head, plus causal attention.

    Attention multiplies each query with the (sequence_length + 1) / 2 keys and values it sees on average: 4 * hidden_size
    operations per pair and layer, twice that in the backward. Recomputation, norms, activations and the embedding look-up
    are not counted.
    """
    return activated_flops_per_token(model, sequence_length, {})


def activated_flops_per_token(model: ModelConfig, sequence_length: int, sparsity_by_projection: dict[str, float]) -> Flops:
    """Training FLOPs that remain when every multiplication by a zero input is skipped.

    Of a projection with N weights and a fraction d of non-zero inputs, these are: forward Y = X W^T, 2Nd; weight gradient
    dY^T X, 2Nd, since it uses the same sparse X; input gradient dY W, 2N, since the straight-through estimator makes it
    dense (Q-Sparse sec. 2.3). Head and attention are dense. `forward` is what an inference engine that skips zeros
    computes for a token. Arguments and errors as in `activated_parameters`.
    """
    activated = activated_parameters(model, sparsity_by_projection)
    nonzero = sum(activated.by_projection.values())
    head = 2 * model.vocab_size * model.hidden_size
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
    and with v chunks a stage those of (v - 1)p + 2(p - s - 1) + 1 chunks.
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


def checkpoint_bytes(model: ModelConfig, precision: Precision, subln: bool = False) -> int:
    """Size of one full checkpoint: the weights and the optimizer state, without file overhead."""
    return parameters(model, subln).total * (ELEMENT_BYTES[precision] + OPTIMIZER_BYTES)


def _stage_memory(
    stage: int, model: ModelConfig, layout: Layout, qsparse: QSparseConfig, bitnet: BitNetConfig, precision: Precision, tokens: int
) -> Memory:
    shapes = projection_shapes(model)
    per_stage, chunks = model.num_layers // layout.pipeline, layout.virtual_pipeline
    per_chunk = per_stage // chunks
    first, last = stage == 0, stage == layout.pipeline - 1
    quantized = activations = norms = 0
    starts = [(chunk * layout.pipeline + stage) * per_chunk for chunk in range(chunks)]
    for layer in (start + i for start in starts for i in range(per_chunk)):
        settings = {n: resolve(layer, model.num_layers, n, inputs, qsparse, bitnet) for n, (_, inputs) in shapes.items()}
        quantized += sum(outputs * inputs for n, (outputs, inputs) in shapes.items() if settings[n].quantized)
        activations += _layer_activation_bytes(model, layout, settings, precision)
        norms += 2 * model.hidden_size + (bitnet.subln * (model.hidden_size + model.ffn_hidden_size)) / layout.tensor
    matrices = per_stage * sum(outputs * inputs for outputs, inputs in shapes.values())
    # A tied head on its own stage still holds a copy of the embedding.
    tables = first + last if not (model.tied_embeddings and layout.pipeline == 1) else 1
    matrices += tables * model.vocab_size * model.hidden_size
    held = matrices / layout.tensor + norms + last * model.hidden_size
    in_flight = layout.pipeline - stage
    if chunks > 1:
        in_flight = ((chunks - 1) * layout.pipeline + 2 * (layout.pipeline - stage - 1) + 1) / chunks
    # Vocabulary-parallel cross entropy keeps the logits in `precision` and their exponentials in fp32.
    logits = last * model.vocab_size / layout.tensor * (ELEMENT_BYTES[precision] + 4)
    partitioned = layout.zero_stage == 3
    return Memory(
        weights=held * ELEMENT_BYTES[precision] / (layout.data if partitioned else 1),
        gradients=held * 4 / (layout.data if layout.zero_stage >= 2 else 1),
        optimizer=held * OPTIMIZER_BYTES / layout.data,
        codes=0 if partitioned else quantized / layout.tensor,
        gathered=min(held, GATHERED_ELEMENTS) * ELEMENT_BYTES[precision] if partitioned else 0,
        activations=tokens * (in_flight * activations + logits),
    )


def _layer_activation_bytes(model: ModelConfig, layout: Layout, settings: dict, precision: Precision) -> float:
    """Bytes that one layer keeps per token for its backward."""
    element = ELEMENT_BYTES[precision]
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    whole = layout.tensor if layout.sequence else 1
    # Codes are one byte; a dense or masked input is kept as it is.
    operand = {name: 1 if s.quantized else element for name, s in settings.items()}
    kept = 2 * hidden * element / whole
    kept += hidden * (operand["attention.qkv"] + operand["mlp.gate_up"]) / whole
    sharded = projection_shapes(model)["attention.qkv"][0] * element + 4 * model.num_attention_heads
    # Attention keeps its output; a projection that changes it (mask, codes) keeps its own operand besides.
    sharded += hidden * element
    if settings["attention.proj"].sparse or settings["attention.proj"].quantized:
        sharded += hidden * operand["attention.proj"]
    # gate and up, relu(gate) and its square (or the SiLU), then the operand of down.
    sharded += 4 * ffn * element + ffn * operand["mlp.down"]
    if settings["mlp.down"].subln:
        sharded += (hidden + ffn) * element
    return kept + sharded / layout.tensor


def _densities(sparsity_by_projection: dict[str, float]) -> dict[str, float]:
    for name, sparsity in sparsity_by_projection.items():
        if name not in PROJECTIONS:
            raise ValueError(f"{name!r} is no projection; they are {', '.join(PROJECTIONS)}")
        if not 0 <= sparsity <= 1:
            raise ValueError(f"the sparsity of {name} is a fraction of zeros in [0, 1], not {sparsity}")
    return {name: 1 - sparsity_by_projection.get(name, 0.0) for name in PROJECTIONS}


def _require_dense(model: ModelConfig) -> None:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    unset = [name for name in names if getattr(model, name) is None]
    if unset:
        raise ValueError(f"model.{unset[0]} is not set: fill the model with presets.apply_preset first")
    if model.num_experts:
        raise ValueError(f"model.num_experts={model.num_experts}: accounting covers dense models only")
