"""Memory of one rank, by arithmetic alone. No torch in here, so that a plan is printed at once."""

from dataclasses import dataclass
from typing import Literal

from megatron_qsparse.config import BitNetConfig, QSparseConfig, resolve
from megatron_qsparse.models.accounting import copies_per_token, expert_copies, parameters, projection_shapes
from megatron_qsparse.models.config import ModelConfig

Precision = Literal["bf16", "fp32"]
ELEMENT_BYTES = {"bf16": 2, "fp32": 4}
OPTIMIZER_BYTES = 12
"""Per parameter: fp32 master weight and Adam's two moments. DeepSpeed keeps the master copy in fp32 training as well."""

GATHERED_ELEMENTS = 1_000_000_000
"""ZeRO-3 keeps at most about so many elements of gathered weights whole at a time; DeepSpeed's own default."""


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
    recompute: bool = False
    """Keep each layer's input only, and compute a layer again when its backward comes."""
    micro_batches: int | None = None
    """Of one rank in a step; None: at least as many as there are stages."""


def memory_per_rank(
    model: ModelConfig, layout: Layout, qsparse: QSparseConfig, bitnet: BitNetConfig,
    precision: Precision, micro_batch_size: int, sequence_length: int,
) -> Memory:  # fmt: skip
    """Memory of the rank that needs most, which is on the first or the last pipeline stage.

    weights: in `precision`. gradients: fp32 accumulation buffers, and in bf16 at stage 1 the gradients of one micro-batch in bf16
    beside them (DeepSpeed's BF16_Optimizer adds them up after each backward). optimizer: `OPTIMIZER_BYTES`. codes: one byte for each
    parameter of a quantized projection, none with ZeRO-3, which makes them anew at each use. activations: an estimate of what
    autograd keeps, without allocator slack or communication buffers; stage s of p holds p - s micro-batches (1F1B), and with v
    chunks a stage those of (v - 1)p + 2(p - s - 1) + 1 chunks. Experts are taken as equally loaded.
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
    codes = activations = largest = 0
    layer_input = model.hidden_size * element / (layout.tensor if layout.sequence else 1)
    starts = [(chunk * layout.pipeline + stage) * per_chunk for chunk in range(chunks)]
    settings: dict = {}
    for layer in (start + i for start in starts for i in range(per_chunk)):
        if qsparse.recipe or not settings:
            # Without a recipe all layers are alike.
            settings = {n: resolve(layer, model.num_layers, n, inputs, qsparse, bitnet) for n, (_, inputs) in shapes.items()}
            layer_codes = sum(_held_here(model, name, shapes, layout) for name in shapes if settings[name].quantized)
            layer_bytes = _layer_activation_bytes(model, layout, settings, precision)
        codes += layer_codes
        activations += layer_input if layout.recompute else layer_bytes
        largest = max(largest, layer_bytes)
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
    in_flight = min(in_flight, layout.micro_batches or in_flight)
    # Vocabulary-parallel cross entropy keeps the logits in `precision` and their exponentials in fp32.
    logits = last * model.vocab_size / layout.tensor * (element + 4)
    partitioned = layout.zero_stage == 3
    sharded = held / layout.data + held_experts / (layout.data / layout.expert)
    return Memory(
        weights=(sharded if partitioned else held + held_experts) * element,
        gradients=4 * sharded if layout.zero_stage >= 2 else (held + held_experts) * (4 + (element if precision == "bf16" else 0)),
        optimizer=sharded * OPTIMIZER_BYTES,
        codes=0 if partitioned else codes,
        gathered=min(held + held_experts, GATHERED_ELEMENTS) * element if partitioned else 0,
        activations=tokens * (in_flight * activations + (largest if layout.recompute else 0) + logits),
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
        if expert:
            # What the router's probability multiplies: the input of down, or its output, whole on every rank.
            if settings[f"{name}down"].subln:
                kept += chosen * hidden * element
            else:
                sharded += chosen * ffn * element
    if model.num_experts:
        # The router's input, and its logits, scores and probabilities in fp32.
        kept += (hidden * element + 3 * 4 * model.num_experts) / whole
    return kept + sharded / layout.tensor
