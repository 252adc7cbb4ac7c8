"""What the user may say about sparsity and quantization, and what it means for one projection.

Projections have the same names everywhere (recipes, metrics, plan): `layers.<i>.attention.qkv`, `layers.<i>.attention.proj`,
`layers.<i>.mlp.gate_up`, `layers.<i>.mlp.down`, with <i> counted from 0 over the whole model. `layers.-1.*` is the last layer.
All experts of a layer share the last two names; a shared expert has `layers.<i>.mlp.shared_gate_up` and `.mlp.shared_down`.
"""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Literal

from megatron_qsparse.ops.counts import keep_count

Mode = Literal["groups", "block", "global"]
PROJECTIONS = ("attention.qkv", "attention.proj", "mlp.gate_up", "mlp.down")
"""Of every layer."""
SHARED_PROJECTIONS = ("mlp.shared_gate_up", "mlp.shared_down")
"""Of a layer with a shared expert, besides."""
ROW_PROJECTIONS = ("attention.proj", "mlp.down", "mlp.shared_down")
"""Projections whose input features are sharded over the tensor-parallel ranks."""


@dataclass(kw_only=True)
class RecipeRule:
    """Settings for the projections whose name matches `match`; the first rule that matches wins."""

    match: str
    """Shell-style pattern on the projection's name, e.g. "layers.0.*", "layers.-1.*", "*.mlp.down"."""
    keep: float | None = None
    """Kept fraction in (0, 1]; 1.0 leaves the projection dense. Unset: as in `qsparse.keep`."""
    bitnet: bool | None = None
    """Whether the projection is 1.58 bit. Unset: as in `bitnet.enabled`."""


@dataclass(kw_only=True)
class QSparseConfig:
    """Top-K sparsification of the inputs of the linear layers (Q-Sparse, arXiv 2407.10969)."""

    keep: float = 1.0
    """Kept fraction of the features of each token, in (0, 1]; 1.0 is dense. Read as a decimal: 0.7 is exactly 7/10."""
    mode: Mode = "groups"
    """How inputs sharded over tensor-parallel ranks (attention.proj, mlp.down, mlp.shared_down) are selected. "groups": K of each
    of `groups` equal slices. "block": N of every M consecutive features, for every projection (Block Q-Sparse). "global": the exact K
    largest of the whole width, at the price of a few small all-reduces. The other projections see the whole width and keep
    its exact K (groups, global). Every mode has one meaning for every tensor-parallel size."""
    groups: int = 8
    """Number of slices of a sharded input in mode "groups". Part of the model: it must be a multiple of the tensor-parallel
    size and divide the widths. 1 gives the paper's selection over the whole width, on one tensor-parallel rank."""
    block_n: int | None = None
    """N of N:M in mode "block". Unset: derived from `keep`. If set, it must agree with `keep`."""
    block_m: int = 32
    """M of N:M in mode "block": features of a block. It must divide every rank's share of the widths."""
    rescale: Literal["none", "l2"] = "none"
    """"l2" gives each masked token the l2 norm it had before the mask. The authors' own code has none."""
    recipe: list[RecipeRule] = field(default_factory=list)
    """Per-projection exceptions, first match wins, e.g. [{match: layers.0.*, keep: 1.0}]."""


@dataclass(kw_only=True)
class BitNetConfig:
    """1.58-bit linear layers: ternary weights (absmean) times int8 activations (absmax per token)."""

    enabled: bool = False
    """Quantize the projections of every layer. Embedding, head, norms and attention scores stay in full precision."""
    subln: bool = False
    """SubLN: a norm before attention.proj, mlp.down and mlp.shared_down, over the full width (BitNet b1.58 2B4T)."""


@dataclass(kw_only=True)
class ParallelConfig:
    """How one model is spread over processes. What remains of the world size is data parallel."""

    tensor: int = 1
    """Tensor-parallel ranks: every linear is split over them."""
    pipeline: int = 1
    """Pipeline stages, scheduled 1F1B."""
    virtual_pipeline: int = 1
    """Chunks of layers on each pipeline stage (interleaved 1F1B): smaller bubbles for more messages. The layers must divide among
    all chunks of all stages, and a rank's micro-batches of a step be a multiple of the stages."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals are split along the sequence over the tensor-parallel ranks."""
    expert: int = 1
    """Expert-parallel ranks: each holds an equal share of every layer's experts. They are data-parallel ranks for everything
    else, so this divides the data-parallel size. Each expert is split over the tensor-parallel ranks."""
    moe_token_dispatcher: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts. "alltoall" sends each token where it is needed; "allgather" gathers all of them everywhere,
    which suits few ranks and many experts per token."""

    @property
    def chunks(self) -> int | None:
        """`virtual_pipeline` as Megatron wants it: None for the plain schedule."""
        return self.virtual_pipeline if self.virtual_pipeline > 1 else None


@dataclass(frozen=True, kw_only=True)
class ProjectionSettings:
    """What one projection of one layer does to its input and its weight; made by `resolve`."""

    name: str
    """e.g. "layers.3.mlp.down"."""
    projection: str
    """One of `PROJECTIONS` or `SHARED_PROJECTIONS`."""
    keep: Fraction = Fraction(1)
    """Kept fraction, exact; 1 means no mask."""
    mode: Mode = "groups"
    groups: int = 1
    """Slices of the full width: 1 for inputs that are whole on every rank and in mode "global", width/M for blocks."""
    rescale: bool = False
    quantized: bool = False
    subln: bool = False

    @property
    def sparse(self) -> bool:
        return self.keep < 1

    def k(self, width: int) -> int:
        """Features kept in each of the `groups` slices of a token of `width` features."""
        return keep_count(self.keep, width // self.groups)


def resolve(layer: int, num_layers: int, projection: str, width: int, qsparse: QSparseConfig, bitnet: BitNetConfig) -> ProjectionSettings:
    """Settings of one projection. layer: 0-based; width: its full input width. Raises ValueError where slices do not fit the width."""
    rule = _first_match(layer, num_layers, projection, qsparse.recipe)
    keep = _keep(rule, qsparse)
    quantized = bitnet.enabled if rule is None or rule.bitnet is None else rule.bitnet
    row, name = projection in ROW_PROJECTIONS, f"layers.{layer}.{projection}"
    groups = 1
    if keep < 1 and qsparse.mode == "block":
        if width % qsparse.block_m:
            raise ValueError(f"{name}: qsparse.block_m={qsparse.block_m} does not divide its {width} input features")
        groups = width // qsparse.block_m
    elif keep < 1 and qsparse.mode == "groups" and row:
        if width % qsparse.groups:
            raise ValueError(f"{name}: qsparse.groups={qsparse.groups} does not divide its {width} input features")
        groups = qsparse.groups
    keep = Fraction(str(keep))
    return ProjectionSettings(
        name=name, projection=projection, keep=keep, mode=qsparse.mode, groups=groups,
        rescale=qsparse.rescale == "l2" and keep < 1, quantized=quantized, subln=bitnet.subln and row,
    )  # fmt: skip


def _first_match(layer: int, num_layers: int, projection: str, recipe: list[RecipeRule]) -> RecipeRule | None:
    names = (f"layers.{layer}.{projection}", f"layers.{layer - num_layers}.{projection}")
    return next((rule for rule in recipe if any(fnmatchcase(name, rule.match) for name in names)), None)


def _keep(rule: RecipeRule | None, qsparse: QSparseConfig) -> float:
    return qsparse.keep if rule is None or rule.keep is None else rule.keep


def problems(qsparse: QSparseConfig, bitnet: BitNetConfig, widths: dict[str, int], num_layers: int, tensor_parallel: int) -> list[str]:
    """Everything in these settings that cannot work, in words. widths: full input width of each projection."""
    found = []
    for where, keep in [("qsparse.keep", qsparse.keep), *((f"qsparse.recipe[{i}].keep", r.keep) for i, r in enumerate(qsparse.recipe))]:
        if keep is not None and not 0 < keep <= 1:
            found.append(f"{where}={keep}: the kept fraction must lie in (0, 1]; 1.0 is dense")
    found += _recipe_problems(qsparse.recipe, num_layers, list(widths))
    if qsparse.groups < 1 or qsparse.block_m < 1:
        found.append(f"qsparse.groups={qsparse.groups} and qsparse.block_m={qsparse.block_m} must be at least 1")
    if found:
        return found
    return _mode_problems(qsparse) + _width_problems(qsparse, widths, num_layers, tensor_parallel)


def _recipe_problems(recipe: list[RecipeRule], num_layers: int, projections: list[str]) -> list[str]:
    found = []
    names = [(layer, projection) for layer in range(num_layers) for projection in projections]
    for i, rule in enumerate(recipe):
        where = f"qsparse.recipe[{i}].match={rule.match!r}"
        if rule.keep is None and rule.bitnet is None:
            found.append(f"{where} changes nothing: give the rule a keep or a bitnet")
        if not any(_first_match(layer, num_layers, projection, [rule]) for layer, projection in names):
            found.append(f"{where} matches no projection: correct it; names are like layers.0.mlp.down")
        elif not any(_first_match(layer, num_layers, projection, recipe) is rule for layer, projection in names):
            found.append(f"{where} is never reached, since earlier rules match first: move it up")
    return found


def _mode_problems(qsparse: QSparseConfig) -> list[str]:
    """Settings of one mode that were changed while another is chosen, and an N:M that contradicts itself."""
    uses = {"groups": "groups", "block_m": "block", "block_n": "block"}
    defaults = QSparseConfig()
    found = [
        f"qsparse.{name}={getattr(qsparse, name)} has no effect in mode {qsparse.mode!r}: set qsparse.mode={mode} or leave it out"
        for name, mode in uses.items()
        if getattr(qsparse, name) != getattr(defaults, name) and qsparse.mode != mode
    ]
    if found or qsparse.block_n is None:
        return found
    n = keep_count(qsparse.keep, qsparse.block_m)
    if n != qsparse.block_n:
        return [f"qsparse.block_n={qsparse.block_n} contradicts qsparse.keep={qsparse.keep}, which keeps {n} of "
                f"{qsparse.block_m}: set qsparse.keep={qsparse.block_n / qsparse.block_m:g} or leave block_n out"]  # fmt: skip
    return []


def _width_problems(qsparse: QSparseConfig, widths: dict[str, int], num_layers: int, tensor_parallel: int) -> list[str]:
    sparse = {
        projection: width
        for projection, width in widths.items()
        if any(_keep(_first_match(layer, num_layers, projection, qsparse.recipe), qsparse) < 1 for layer in range(num_layers))
    }
    if not sparse:
        if qsparse.rescale != "none":
            return [f"qsparse.rescale={qsparse.rescale} has no effect where nothing is sparse: lower qsparse.keep or leave it out"]
        return []
    found = []
    if qsparse.mode == "groups" and qsparse.groups % tensor_parallel and sparse.keys() & set(ROW_PROJECTIONS):
        found.append(f"qsparse.groups={qsparse.groups} is not a multiple of parallel.tensor={tensor_parallel}; groups are part of the "
                     "model, so choose them before training for the largest tensor-parallel size you will use")  # fmt: skip
    for projection, width in sparse.items():
        row = projection in ROW_PROJECTIONS
        if qsparse.mode == "block" and width % (qsparse.block_m * (tensor_parallel if row else 1)):
            share = f"{width}/{tensor_parallel}" if row else f"{width}"
            found.append(
                f"qsparse.block_m={qsparse.block_m} does not divide the {share} input features of {projection} on a rank: choose another"
            )
        if qsparse.mode == "groups" and row and width % qsparse.groups:
            found.append(f"qsparse.groups={qsparse.groups} does not divide the {width} input features of {projection}: choose another")
    return found or _dense_after_all(qsparse, sparse, num_layers)


def _dense_after_all(qsparse: QSparseConfig, widths: dict[str, int], num_layers: int) -> list[str]:
    """A kept fraction that rounds to every feature of a slice: sparse by its settings, and a dense run."""
    found = {}
    for projection, width in widths.items():
        for layer in range(num_layers):
            settings = resolve(layer, num_layers, projection, width, qsparse, BitNetConfig())
            size = width // settings.groups
            if settings.sparse and settings.k(width) == size:
                found[projection] = (
                    f"{projection} keeps all {size} features of each slice at a kept fraction of {float(settings.keep):g}: lower "
                    "qsparse.keep, or choose larger slices (smaller qsparse.groups, larger qsparse.block_m)"
                )
    return list(found.values())
