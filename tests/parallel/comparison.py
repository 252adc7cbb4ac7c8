"""How far one step in some layout is from the same step of the reference, and what of it is too far."""

from dataclasses import dataclass, field

import torch

from tests.parallel.recording import Choices

LOSS = 2e-6
"""Absolute, nat."""
NORM = 1e-5
"""Relative."""
TENSOR = 1e-5
"""Gradients, weights and inputs of projections: of the largest entry of the whole tensor."""
FLIPS = 1e-4
"""Share of all mask entries and codes."""
MASK_TIE, CODE_TIE = 1e-5, 1e-3
"""A near-tie: magnitudes that differ by less than this part of their token's largest; codes this close to the middle of two."""
_COPIES = {"output_layer.weight": "embedding.word_embeddings.weight"}
"""A tied weight is two parameters in a pipeline and one without it."""


@dataclass
class Trace:
    """One training step: what it computed, whole."""

    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]
    """As the optimizer got them: reduced and clipped, fp32."""
    weights: dict[str, torch.Tensor]
    """After the step, fp32 master weights."""
    updates: int
    """Adam's count after the step."""
    alphas: dict[str, torch.Tensor]
    """Distinct scales of each ternary weight."""
    choices: dict[tuple[str, str], Choices]
    differing: list[str] = field(default_factory=list)
    """Replicated tensors that are not the same on all ranks."""


@dataclass
class Comparison:
    """Differences from the reference; relative ones of the tensor named."""

    step: str
    loss: float
    norm: float
    gradient: tuple[float, str]
    weight: tuple[float, str]
    updates: int
    """Difference of Adam's counts."""
    inputs: tuple[float, str] = (0.0, "")
    """Of the projections' inputs, up to each sample's first flip."""
    entries: int = 0
    """Mask entries and codes of the step."""
    flips: int = 0
    """Those that differ, up to the first projection of each sample where any does: what follows differs with it."""
    unexplained: list[str] = field(default_factory=list)
    """Projections with flips that are no near-ties."""
    alphas: list[str] = field(default_factory=list)
    """Ternary weights whose scales are not the same bits."""
    differing: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """What is wrong, in words; nothing where the step is the reference's."""
        found = [f"{name}: not the same on all ranks" for name in self.differing]
        found += [f"alpha of {name}: other bits" for name in self.alphas]
        found += self.unexplained
        if self.flips > FLIPS * self.entries:
            found.append(f"{self.flips} of {self.entries} mask entries and codes differ, more than {FLIPS}")
        if self.updates:
            found.append(f"Adam's count of updates differs by {self.updates}")
        if self.inputs[0] > TENSOR:
            found.append(f"input of {self.inputs[1]}: differs by {self.inputs[0]:.1e} of its maximum, more than {TENSOR}")
        if self.flips == 0:
            found += [
                f"{what}: differs by {difference:.1e}, more than {limit}"
                for what, difference, limit in (
                    ("loss", self.loss, LOSS),
                    ("gradient norm", self.norm, NORM),
                    (f"gradient of {self.gradient[1]}", self.gradient[0], TENSOR),
                    (f"weight {self.weight[1]} after the step", self.weight[0], TENSOR),
                )
                if not difference <= limit
            ]
        return [f"{self.step}: {problem}" for problem in found]


def compare(step: str, reference: Trace, other: Trace) -> Comparison:
    """other against the reference."""
    found = Comparison(
        step, abs(other.loss - reference.loss), abs(other.norm / reference.norm - 1), _worst(reference.gradients, other.gradients),
        _worst(reference.weights, other.weights), abs(other.updates - reference.updates), differing=other.differing,
    )  # fmt: skip
    found.alphas = [name for name, alpha in reference.alphas.items() if not torch.equal(alpha, other.alphas[name])]
    _compare_choices(reference.choices, other.choices, found)
    return found


def _expected(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The reference's tensor for each of the other's."""
    assert reference.keys() <= other.keys()
    return {name: reference[name if name in reference else _COPIES[name]] for name in other}


def _worst(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    return max((_relative(other[name] - tensor, tensor), name) for name, tensor in _expected(reference, other).items())


def least_cosine(reference: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The smallest of any gradient, and whose it is; minus infinity where it is not a number."""
    cosines = []
    for name, tensor in _expected(reference, other).items():
        here, there = other[name].double().flatten(), tensor.double().flatten()
        value = (here @ there / here.norm() / there.norm()).item()
        cosines.append((value if value == value else float("-inf"), name))
    return min(cosines)


def _relative(difference: torch.Tensor, tensor: torch.Tensor) -> float:
    """Largest |difference| relative to the largest |tensor|; infinity where it is not a number."""
    value = (difference.abs().max() / tensor.abs().max().clamp(min=1e-30)).item()
    return value if value == value else float("inf")


def _compare_choices(reference: dict[tuple[str, str], Choices], other: dict[tuple[str, str], Choices], found: Comparison) -> None:
    assert reference.keys() == other.keys()
    clean: torch.Tensor | None = None
    for (kind, name), expected in reference.items():
        here = other[kind, name]
        found.entries += expected.chosen.numel()
        if clean is None:
            clean = torch.ones(len(expected.chosen), dtype=torch.bool)
        # An expert has tokens of all samples.
        wanted = clean.all()[None] if expected.of_expert else clean.clone()
        if not wanted.any() or not expected.chosen.numel():
            continue
        if expected.of_expert and here.inputs.shape == expected.inputs.shape:
            here = _in_order(expected, here)
        if here.inputs.shape != expected.inputs.shape:
            found.unexplained.append(f"{kind} of {name}: {list(here.inputs.shape)} instead of {list(expected.inputs.shape)}")
            clean[:] = False
            continue
        flipped = expected.chosen[wanted] != here.chosen[wanted]
        found.flips += int(flipped.sum())
        found.inputs = max(found.inputs, (_relative((here.inputs - expected.inputs)[wanted], expected.inputs), name))
        if not (_mask_ties if kind == "mask" else _code_ties)(expected, here, wanted, flipped):
            found.unexplained.append(f"{kind} of {name}: {int(flipped.sum())} entries differ that are no near-ties")
        if expected.of_expert:
            clean &= not flipped.any()
        else:
            clean[wanted] = ~flipped.flatten(1).any(1)


def _in_order(expected: Choices, here: Choices) -> Choices:
    """`here` with its tokens in the order of `expected`, which depends on the dispatcher: the nearest one that is left, each."""
    distances = torch.cdist(expected.inputs[0].double(), here.inputs[0].double(), compute_mode="donot_use_mm_for_euclid_dist")
    order = []
    for row in distances:
        nearest = int(row.argmin())
        order.append(nearest)
        distances[:, nearest] = torch.inf
    scale = None if here.scale is None else here.scale[:, order]
    return Choices(here.inputs[:, order], here.chosen[:, order], scale, here.groups)


def _mask_ties(expected: Choices, here: Choices, clean: torch.Tensor, flipped: torch.Tensor) -> bool:
    """Whether the entries that were swapped in a slice of a token have nearly the same magnitude, and are swapped one for one."""
    one, other = (choices.chosen[clean].unflatten(-1, (expected.groups, -1)).sum(-1) for choices in (expected, here))
    if not torch.equal(one, other):
        return False
    magnitude = expected.inputs[clean].abs()
    largest = magnitude.amax(-1, keepdim=True)
    magnitude, flipped = (tensor.unflatten(-1, (expected.groups, -1)) for tensor in (magnitude, flipped))
    high = torch.where(flipped, magnitude, 0).amax(-1)
    low = torch.where(flipped, magnitude, torch.inf).amin(-1)
    return bool((~flipped.any(-1) | (high - low <= MASK_TIE * largest)).all())


def _code_ties(expected: Choices, here: Choices, clean: torch.Tensor, flipped: torch.Tensor) -> bool:
    """Whether codes that differ are neighbours, and what was rounded lies in the middle of the two."""
    exact = (expected.inputs[clean] / expected.scale[clean])[flipped]
    steps = (expected.chosen[clean][flipped].int() - here.chosen[clean][flipped].int()).abs()
    return bool((((exact - exact.floor() - 0.5).abs() < CODE_TIE) & (steps == 1)).all())
