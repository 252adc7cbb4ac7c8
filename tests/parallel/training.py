"""Short training runs of small models, described by a `Case`, and the same by plain torch.optim.AdamW."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch

from tests.parallel.helpers import ENGINES, SEQUENCE, build, gather, layout, load, tokens

GLOBAL_BATCH, LR, DECAY, EPS = 4, 1e-2, 0.1, 1e-4
UNTIED_TWIN = {"tied_bitnet_subln": "bitnet_groups_subln"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One run. What the layout leaves of the world is data parallel; the global batch is the same for all."""

    variant: str = "dense"
    precision: str = "fp32"
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    """Chunks of layers on each pipeline stage."""
    sequence: bool = False
    expert: int = 1
    dispatcher: str = "alltoall"
    stage: int = 1
    steps: int = 3
    recompute: bool = False
    layers: int = 2
    micro_batch: int = 1
    """Samples."""
    partition: tuple[int, int, int] = (0, 0, 0)
    """Stage 3: persistence threshold, reuse distance and prefetch of `PartitionSettings`."""
    starved: int = 0
    """The first so many experts get no token: their logits are lowered."""
    data: int = 0
    """Only by `train_plainly`, with `expert`: the data-parallel ranks whose rounding it has; 0: as many as expert-parallel ones."""
    two_copies: bool = False
    """Only by `train_plainly`: a tied embedding as two parameters that share a master weight, as on two pipeline stages."""


@dataclass
class History:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whole tensors after the FIRST step, in the working precision."""
    refreshes: int = 0
    """How often ternary codes were made."""


def make_engine(case: Case, parallel, weights: dict[str, torch.Tensor] | None = None, clip: float = 1.0):
    """The library's engine; from the library's own initial weights where none are given.

    At stage 3 no parameter is whole longer than it must be, unless the case says so.
    """
    from megatron_qsparse.compat import deepspeed
    from megatron_qsparse.parallel.partition import PartitionSettings
    from megatron_qsparse.parallel.zero import AdamSettings, ZeroEngine

    deepspeed.load()
    _restart_numbering()
    model = build(case.variant, parallel, dtype=DTYPES[case.precision], recompute=case.recompute, layers=case.layers)
    if weights is not None:
        load(model, weights)
    adam = AdamSettings(beta1=0.9, beta2=0.95, eps=EPS, clip=clip)
    persistence, reuse, prefetch = case.partition
    partition = PartitionSettings(persistence_threshold=persistence, reuse_distance=reuse, prefetch=prefetch)
    engine = ZeroEngine(
        model, stage=case.stage, adam=adam, micro_batch_size=case.micro_batch, sequence_length=SEQUENCE, partition=partition
    )  # fmt: skip
    ENGINES.append(engine)
    return engine


def _restart_numbering() -> None:
    """DeepSpeed numbers the parameters and modules of all engines that a process ever had. At stage 3 it requires the same
    numbers on all ranks, but a pool's processes have had different ones.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    [modules] = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    modules[0] = 0


def micro_batches(step: int, samples: int = GLOBAL_BATCH, size: int = 1) -> list[torch.Tensor]:
    """This data-parallel rank's part of the global batch of a step."""
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(tokens(samples, seed=1000 + step).chunk(ranks)[rank].split(size))


def case_layout(case: Case):
    return layout(case.tensor, case.pipeline, case.sequence, case.virtual, case.expert, case.dispatcher)


def take_step(engine, step: int, lr: float = LR, samples: int = GLOBAL_BATCH):
    batches = micro_batches(step, samples, engine.micro_batch_size)
    return engine.train_step(iter(batches), len(batches), lr, DECAY)


def train(case: Case) -> History:
    """Collective over the world."""
    with case_layout(case) as parallel, starving(case.starved):
        engine = make_engine(case, parallel)
        results = [take_step(engine, 0)]
        weights = gather(engine.model)
        results += [take_step(engine, step) for step in range(1, case.steps)]
        return History([r.loss for r in results], [r.grad_norm for r in results], weights, engine.ternary.refreshes)


def train_all(rank: int, cases: list[Case]) -> dict[Case, History]:
    """For a `Pool`."""
    return {case: train(case) for case in cases}


@contextlib.contextmanager
def starving(experts: int) -> Iterator[None]:
    """No token goes to the first `experts` experts of any layer."""
    from megatron_qsparse.layers.moe import MeteredRouter

    routing = MeteredRouter.routing

    def unfair(self, logits, *args, **kwargs):
        penalty = torch.zeros(logits.shape[-1])
        penalty[:experts] = 1e4
        return routing(self, logits - penalty, *args, **kwargs)

    with mock.patch.object(MeteredRouter, "routing", unfair) if experts else contextlib.nullcontext():
        yield


def train_plainly(rank: int, cases: list[Case]) -> dict[Case, History]:
    """The same runs on one rank without DeepSpeed, Megatron's schedule or our engine: accumulate, clip, AdamW.

    bf16 by hand: fp32 master weights, gradients of the bf16 model summed in fp32. A case with `expert` ranks has the same
    rounding as they have: a rank's experts see one micro-batch of each rank at once, and round that gradient once.
    """
    return {case: _train_plainly(case) for case in cases}


def _train_plainly(case: Case) -> History:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_qsparse.layers.ternary import TernaryWeights

    variant = UNTIED_TWIN[case.variant] if case.two_copies else case.variant
    with layout() as parallel, starving(case.starved):
        model = build(variant, parallel, dtype=DTYPES[case.precision])
        ternary = TernaryWeights(model.modules())
        masters = _Masters(model, case.two_copies)
        history = History([], [])
        positions = torch.arange(SEQUENCE).expand(case.micro_batch, -1)
        for step in range(case.steps):
            total = 0.0
            batches = micro_batches(step, size=case.micro_batch)
            # Every micro-batch's load-balancing loss counts like its own loss.
            MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1 / len(batches)))
            for batch in batches:
                losses = model(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())
                loss = losses.float().mean()
                (loss / len(batches)).backward()
                total += loss.item() / len(batches)
                masters.accumulate(lambda name: case.expert == 1 or "local_experts" not in name)
            for batch in map(torch.cat, _seen_together(batches, case)):
                MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), case.expert / len(batches)))
                losses = model(batch[:, :-1].contiguous(), positions.repeat(case.expert, 1), None, labels=batch[:, 1:].contiguous())
                (losses.float().mean() * case.expert / len(batches)).backward()
                masters.accumulate(lambda name: "local_experts" in name)
            history.norms.append(masters.step())
            history.losses.append(total)
            ternary.invalidate()
            history.weights = history.weights or gather(model)
        return history


def _seen_together(batches: list[torch.Tensor], case: Case) -> list[tuple[torch.Tensor, ...]]:
    """The micro-batches whose tokens meet in the experts: at each turn those of neighbouring ranks, as many as share the experts."""
    if case.expert == 1:
        return []
    ranks = case.data or case.expert
    each = len(batches) // ranks
    of_ranks = [batches[rank * each : (rank + 1) * each] for rank in range(ranks)]
    return [turn for first in range(0, ranks, case.expert) for turn in zip(*of_ranks[first : first + case.expert], strict=True)]


class _Masters:
    """fp32 master weights, gradients and AdamW of a model in any precision."""

    def __init__(self, model, two_copies: bool):
        named = dict(model.named_parameters())
        if two_copies:
            with torch.no_grad():
                named["output_layer.weight"].copy_(named["embedding.word_embeddings.weight"])
        self.of = {name: param.detach().float().clone().requires_grad_() for name, param in named.items()}
        if two_copies:
            self.of["output_layer.weight"] = self.of["embedding.word_embeddings.weight"]
        self.params, self.masters = named, list(dict.fromkeys(self.of.values()))
        groups = [
            {"params": [m for m in self.masters if m.dim() > 1], "weight_decay": DECAY},
            {"params": [m for m in self.masters if m.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPS, fused=True)

    def accumulate(self, wanted: Callable[[str], bool]) -> None:
        """Add the gradients of the parameters with a wanted name, and forget the others'."""
        for name, param in self.params.items():
            master, grad = self.of[name], param.grad.float()
            if wanted(name):
                master.grad = grad if master.grad is None else master.grad + grad
            param.grad = None

    @torch.no_grad()
    def step(self) -> float:
        """Clip, update, copy back; returns the norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, param in self.params.items():
            param.copy_(self.of[name])
        return norm
