"""All layouts of a run on a cluster: which are possible, which fit, and which may be fastest."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.memory import Memory
from pretrain.config import PretrainConfig
from pretrain.layouts import layout_of, memory_of
from pretrain.suggest.step_time import Cluster, StepTime, step_time
from pretrain.validation import layout as rules

SEARCHED = (
    "parallel.tensor", "parallel.sequence", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.expert", "zero.stage",
    "train.recompute", "train.micro_batch_size",
)  # fmt: skip
"""The settings that a layout consists of; all others stay as they are."""
EQUAL = 0.15
"""Step times that differ by less, relative to the shortest, are taken to be the same: the estimate cannot tell more."""
COMFORTABLE = 0.6
"""Fraction of a GPU's memory below which there is no reason to take less."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that is possible."""

    config: PretrainConfig
    memory: Memory
    time: StepTime
    micro_batches: int

    @property
    def settings(self) -> dict[str, bool | int]:
        """The values of `SEARCHED`."""
        return {name: getattr(getattr(self.config, name.split(".")[0]), name.split(".")[1]) for name in SEARCHED}

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.train.global_batch_size * self.config.data.sequence_length


@dataclass(kw_only=True)
class Suggestions:
    """What was found."""

    fitting: list[Candidate] = field(default_factory=list)
    """Shortest step first; of equal ones the one that needs less memory."""
    nearest: Candidate | None = None
    """Of those that do not fit, the one that needs least memory."""
    possible: int = 0
    """Layouts that the model and the batch allow, whatever their memory."""
    refused: Counter = field(default_factory=Counter)
    """Why layouts are impossible, and how many are for this reason."""
    best: Candidate | None = None
    """The layout to take: of those that are fastest as far as the estimate can tell, the simplest (`_simplest`)."""


def _simplest(candidate: Candidate, cluster: Cluster) -> tuple:
    """What may go wrong where the assumptions do comes last; then fewest ranks for a layer, then the shortest step.

    In this order: higher ZeRO stages, which send gradients and weights for every micro-batch; experts spread over nodes; pipeline
    stages; recomputation; memory above `COMFORTABLE`; tensor parallelism without sequence parallelism, where every rank does all
    norms and top-K of a layer's inputs, which the estimate leaves out; chunks of a stage.
    """
    config, parallel = candidate.config, candidate.config.parallel
    return (
        config.zero.stage,
        parallel.expert > 1 and parallel.expert * parallel.tensor > cluster.gpus_per_node,
        parallel.pipeline,
        config.train.recompute,
        candidate.memory.total > COMFORTABLE * cluster.gpu.memory,
        parallel.tensor > 1 and not parallel.sequence,
        parallel.virtual_pipeline,
        parallel.tensor,
        candidate.time.total,
    )


def search(
    config: PretrainConfig, model: ModelConfig, cluster: Cluster, usable: float, pinned: frozenset[str] = frozenset()
) -> Suggestions:
    """Every layout of `config` on the whole cluster, its global batch unchanged.

    model: resolved. usable: bytes of a GPU that weights, states and activations may take. pinned: names of `SEARCHED` that keep
    the value they have in `config`.
    """
    found = Suggestions()
    for candidate in candidates(config, model, cluster, pinned, found.refused):
        found.possible += 1
        if candidate.memory.total <= usable:
            found.fitting.append(candidate)
        elif found.nearest is None or candidate.memory.total < found.nearest.memory.total:
            found.nearest = candidate
    found.fitting.sort(key=lambda item: (item.time.total, item.memory.total))
    if found.fitting:
        limit = (1 + EQUAL) * found.fitting[0].time.total
        found.best = min((item for item in found.fitting if item.time.total <= limit), key=lambda item: _simplest(item, cluster))
    return found


def candidates(
    config: PretrainConfig, model: ModelConfig, cluster: Cluster, pinned: frozenset[str], refused: Counter
) -> Iterator[Candidate]:
    """What `pretrain.validate` would let start. refused: counts the reasons of the others."""
    of_projections: dict[int, list[str]] = {}
    for settings in _combinations(config, model, cluster, pinned):
        changed = with_settings(config, settings)
        tensor = changed.parallel.tensor
        if tensor not in of_projections:
            # They take longest, and of a layout only the tensor-parallel size matters to them.
            of_projections[tensor] = rules.projection_problems(changed, model)
        if problems := layout_problems(changed, model, cluster.world_size) or of_projections[tensor]:
            refused.update(problems[:1])
            continue
        yield evaluate(changed, model, cluster)


def evaluate(config: PretrainConfig, model: ModelConfig, cluster: Cluster) -> Candidate:
    """Memory and time of a layout that is possible."""
    return Candidate(
        config=config, memory=memory_of(config, cluster.world_size, model), time=step_time(config, model, cluster),
        micro_batches=layout_of(config, cluster.world_size).micro_batches,
    )  # fmt: skip


def layout_problems(config: PretrainConfig, model: ModelConfig, world_size: int) -> list[str]:
    """What `pretrain.validate.examine` says of the settings in `SEARCHED`, but for the widths of sparse inputs."""
    return (
        rules.batch_problems(config, world_size) or rules.model_problems(config, model) or rules.expert_problems(config, model, world_size)
    )


def with_settings(config: PretrainConfig, settings: dict[str, bool | int]) -> PretrainConfig:
    """A copy of `config` with these values of `SEARCHED`."""
    sections: dict[str, dict] = {}
    for name, value in settings.items():
        section, field_name = name.split(".")
        sections.setdefault(section, {})[field_name] = value
    return replace(config, **{section: replace(getattr(config, section), **values) for section, values in sections.items()})


def _combinations(config: PretrainConfig, model: ModelConfig, cluster: Cluster, pinned: frozenset[str]) -> Iterator[dict[str, bool | int]]:
    """Settings worth asking about: divisors of what they must divide, and not what the rules refuse always."""
    world, batch = cluster.world_size, config.train.global_batch_size

    def values(name: str, offered: list) -> list:
        section, field_name = name.split(".")
        return [getattr(getattr(config, section), field_name)] if name in pinned else offered

    for tensor, pipeline in product(
        values("parallel.tensor", _divisors(cluster.gpus_per_node)), values("parallel.pipeline", _divisors(model.num_layers))
    ):
        if world % (tensor * pipeline) and pinned.isdisjoint({"parallel.tensor", "parallel.pipeline"}):
            continue
        data = max(1, world // (tensor * pipeline))
        chunks = _divisors(max(1, model.num_layers // pipeline)) if pipeline > 1 else [1]
        for sequence, virtual, expert, stage, recompute, size in product(
            values("parallel.sequence", [False, True] if tensor > 1 else [False]),
            values("parallel.virtual_pipeline", chunks),
            values("parallel.expert", _divisors(model.num_experts) if model.num_experts else [1]),
            values("zero.stage", [1, 2] if pipeline > 1 else [1, 2, 3]),
            values("train.recompute", [False, True]),
            values("train.micro_batch_size", _divisors(max(1, batch // data))),
        ):
            yield {
                "parallel.tensor": tensor, "parallel.sequence": sequence, "parallel.pipeline": pipeline,
                "parallel.virtual_pipeline": virtual, "parallel.expert": expert, "zero.stage": stage,
                "train.recompute": recompute, "train.micro_batch_size": size,
            }  # fmt: skip


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
