"""The invariance suite's rows: which variants of the model meet which layouts.

A layout is a line in `LAYOUTS`, a variant one in `helpers.VARIANTS`; `make test` runs `pairs()`, `make test-all` the full
product. Each layout runs on exactly the ranks it needs.
"""

from dataclasses import dataclass, field

from tests.parallel.helpers import VARIANTS
from tests.parallel.training import Case

LAYERS = 4


@dataclass(frozen=True)
class Layout:
    """How the model is spread; `changes` are those of a `Case`."""

    ranks: int
    changes: dict = field(default_factory=dict)

    def case(self, variant: str, precision: str, **more) -> Case:
        return Case(variant, precision, layers=LAYERS, **self.changes, **more)


LAYOUTS = {
    "one": Layout(1),
    "tp2": Layout(2, {"tensor": 2}),
    "tp4": Layout(4, {"tensor": 4}),
    "tp2-sp": Layout(2, {"tensor": 2, "sequence": True}),
    "tp4-sp": Layout(4, {"tensor": 4, "sequence": True}),
    "pp2": Layout(2, {"pipeline": 2}),
    "pp4": Layout(4, {"pipeline": 4}),
    "tp2-pp2": Layout(4, {"tensor": 2, "pipeline": 2}),
    "tp2-pp2-sp": Layout(4, {"tensor": 2, "pipeline": 2, "sequence": True}),
    "dp2": Layout(2),
    "dp4": Layout(4),
    "tp2-dp2": Layout(4, {"tensor": 2}),
    "dp2-zero2": Layout(2, {"stage": 2}),
    "tp2-dp2-zero2": Layout(4, {"tensor": 2, "stage": 2}),
    "pp2-zero2": Layout(2, {"pipeline": 2, "stage": 2}),
    "pp2-dp2": Layout(4, {"pipeline": 2}),
    "dp2-zero3": Layout(2, {"stage": 3}),
    "dp2-zero3-recompute": Layout(2, {"stage": 3, "recompute": True}),
    "tp2-sp-dp2-zero3": Layout(4, {"tensor": 2, "sequence": True, "stage": 3}),
    "ep2": Layout(2, {"expert": 2}),
    "ep2-zero2": Layout(2, {"expert": 2, "stage": 2}),
    "ep2-allgather": Layout(2, {"expert": 2, "dispatcher": "allgather"}),
    "ep2-dp4": Layout(4, {"expert": 2}),
    "ep2-pp2": Layout(4, {"expert": 2, "pipeline": 2}),
    "ep2-tp2-sp": Layout(4, {"expert": 2, "tensor": 2, "sequence": True}),
    "tp2-sp-micro2": Layout(2, {"tensor": 2, "sequence": True, "micro_batch": 2}),
    "pp2-micro2": Layout(2, {"pipeline": 2, "micro_batch": 2}),
    "ep2-tp2-sp-micro2": Layout(4, {"expert": 2, "tensor": 2, "sequence": True, "micro_batch": 2}),
    "pp2-virtual2": Layout(2, {"pipeline": 2, "virtual": 2}),
    "pp2-virtual2-zero2-recompute": Layout(2, {"pipeline": 2, "virtual": 2, "stage": 2, "recompute": True}),
    "tp2-sp-pp2-virtual2": Layout(4, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual": 2}),
    "ep2-pp2-virtual2": Layout(4, {"expert": 2, "pipeline": 2, "virtual": 2}),
    "recompute": Layout(1, {"recompute": True}),
    "pp2-recompute": Layout(2, {"pipeline": 2, "recompute": True}),
    "tp2-sp-recompute": Layout(2, {"tensor": 2, "sequence": True, "recompute": True}),
}


@dataclass(frozen=True)
class Pair:
    variant: str
    layout: str
    precision: str = "fp32"
    following: bool = False
    """Compare the step after the one from the checkpoint too."""

    @property
    def ranks(self) -> int:
        return LAYOUTS[self.layout].ranks

    def case(self, **more) -> Case:
        return LAYOUTS[self.layout].case(self.variant, self.precision, **more)

    def reference(self) -> Case:
        """Of one process."""
        return Case(self.variant, self.precision, layers=LAYERS, micro_batch=self.case().micro_batch)

    def __str__(self) -> str:
        return "-".join([self.variant, self.layout] + ["bf16"] * (self.precision == "bf16") + ["following"] * self.following)


EVERY_LAYOUT = ("dense", "groups", "bitnet_groups_subln")
"""Variants that meet every one of `MAIN_LAYOUTS` in `make test`; the last one meets the other layouts too."""
MAIN_LAYOUTS = ("one", "tp2", "tp4", "tp2-sp", "pp2", "pp4", "tp2-pp2", "dp2", "dp4", "dp2-zero2", "dp2-zero3", "recompute")
EVERY_VARIANT = ("tp4", "pp2", "dp2-zero2")
"""Layouts that every variant meets in `make test`."""
EXPERTS = ("moe", "moe_bitnet_groups", "moe_bitnet_groups_subln")
EXPERTS_LAYOUTS = ("ep2", "ep2-pp2", "ep2-tp2-sp")
BF16_LAYOUTS = ("dp2", "dp2-zero2", "dp2-zero3", "pp2", "pp2-recompute", "pp2-virtual2", "pp2-virtual2-zero2-recompute")
"""In bf16 a tensor-parallel rank rounds its partial sum before the sum over ranks, so these only have the reference's numbers; see
test_bf16_tensor.py."""
FREE_VARIANTS = ("dense", "groups", "block")
FREE_LAYOUTS = ("tp4", "pp4", "dp2-zero2", "tp2-sp", "tp2-pp2", "dp4", "dp2-zero3")
FREE_STEPS, FREE_LOSS = 8, 1e-5

FAULTS = [
    ("all groups in each shard", Pair("groups", "tp4"), "mask of layers.0.attention.proj"),
    ("top-K of each shard", Pair("global", "tp4"), "mask of layers.0.attention.proj"),
    ("absmean of each shard", Pair("bitnet", "tp2-sp"), "alpha of "),
    ("absmax of each shard", Pair("bitnet", "tp4"), "of layers.0.attention.proj"),
    ("SubLN of each shard", Pair("subln", "tp4"), "loss"),
    ("SubLN without its backward reduction", Pair("subln", "tp4"), "gradient of "),
    ("rescale of each shard", Pair("rescale", "tp4"), "layers.0.mlp.gate_up"),
    ("query, key and value rows by local index", Pair("one_kv_head", "tp4"), "alpha of "),
    ("no sequence-parallel hook", Pair("dense", "tp2-sp"), "layernorm"),
    ("stale alpha", Pair("bitnet_groups_subln", "dp2", following=True), "alpha of "),
    ("no sum of a tied embedding", Pair("tied", "pp2"), "output_layer.weight"),
    ("Adam's step count reset", Pair("dense", "dp2"), "Adam's count of updates"),
    ("no reset before each backward", Pair("dense", "pp2-zero2"), "gradient norm"),
    ("no reset before each backward", Pair("dense", "pp2", "bf16"), "gradient norm"),
]
"""What is slipped in; the pair, one of `pairs()`, that must find it; and words that one of its problems must have."""


def possible(pair: Pair) -> bool:
    """Whether the library has it, and one process is its reference."""
    model, case = VARIANTS[pair.variant][0], pair.case()
    if case.expert > 1 and not model.num_experts:
        return False
    # Megatron's experts on tensor-parallel ranks need sequence parallelism.
    if model.num_experts and case.tensor > 1 and not case.sequence:
        return False
    # ZeRO-2 has scattered a tied embedding's gradients before they can be summed. In bf16 two stages round each of its two
    # gradients, one process their sum: test_pipeline compares those with a reference that keeps two copies.
    return not (model.tied_embeddings and case.pipeline > 1 and (case.stage > 1 or pair.precision == "bf16"))


def pairs() -> list[Pair]:
    """Those of `make test`."""
    found = [Pair(variant, layout) for layout in MAIN_LAYOUTS for variant in EVERY_LAYOUT]
    found += [Pair(EVERY_LAYOUT[-1], layout) for layout in LAYOUTS]
    found += [Pair(variant, layout) for variant in VARIANTS for layout in EVERY_VARIANT]
    found += [Pair(variant, layout) for variant in EXPERTS for layout in EXPERTS_LAYOUTS]
    found += [Pair(variant, "tp4-sp") for variant in ("one_kv_head", "two_kv_heads")]
    found += [Pair("moe_bitnet_groups_subln", layout) for layout in ("ep2-tp2-sp-micro2", "ep2-pp2-virtual2", "dp2-zero3")]
    found += [Pair("tied_bitnet_subln", "pp2-virtual2"), Pair("moe", "ep2-pp2-virtual2")]
    found += [Pair("dense", layout, "bf16") for layout in ("pp2-virtual2", "pp2-virtual2-zero2-recompute")]
    found += [Pair("bitnet", "tp2-sp"), Pair("dense", "pp2-zero2"), Pair("bitnet_groups_subln", "dp2", following=True)]
    found += [Pair("dense", layout, "bf16") for layout in ("dp2-zero2", "pp2", "dp2-zero3")]
    found += [Pair("bitnet_groups_subln", layout, "bf16") for layout in ("dp2", "dp2-zero3", "pp2-recompute")]
    return [pair for pair in dict.fromkeys(found) if possible(pair)]


def all_pairs() -> list[Pair]:
    """The full product, those of `make test` first."""
    product = [Pair(variant, layout) for variant in VARIANTS for layout in LAYOUTS]
    product += [Pair(variant, layout, "bf16") for variant in VARIANTS for layout in BF16_LAYOUTS]
    return list(dict.fromkeys(pairs() + [pair for pair in product if possible(pair)]))


def free_pairs() -> list[Pair]:
    """Those of `make test`: each variant on three layouts, each layout at least once."""
    return [Pair(variant, FREE_LAYOUTS[(3 * i + j) % len(FREE_LAYOUTS)]) for i, variant in enumerate(FREE_VARIANTS) for j in range(3)]


def all_free_pairs() -> list[Pair]:
    return [Pair(variant, layout) for variant in FREE_VARIANTS for layout in FREE_LAYOUTS]
