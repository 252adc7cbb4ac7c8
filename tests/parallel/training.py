"""Short training runs of small models, described by a `Case`, and the same by plain torch.optim.AdamW."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch

from tests.parallel.helpers import SEQUENCE, build, gather, layout, tokens

GLOBAL_BATCH, MICRO_BATCH, LR, DECAY, EPS = 4, 1, 1e-2, 0.1, 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One run. What the layout leaves of the world is data parallel; the global batch is the same for all."""

    variant: str = "dense"
    precision: str = "fp32"
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = False
    stage: int = 1
    steps: int = 3
    recompute: bool = False
    without_reset: bool = False
    """Undo the reset of DeepSpeed's bookkeeping before each backward, to show that it is needed."""


@dataclass
class History:
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """Whole tensors at the end, in the working precision."""
    refreshes: int = 0
    """How often ternary codes were made."""


def make_engine(case: Case, parallel):
    """The library's engine, with the gradient clipped at 1."""
    from megatron_qsparse.parallel.zero import AdamSettings, ZeroEngine

    model = build(case.variant, parallel, dtype=DTYPES[case.precision], recompute=case.recompute)
    adam = AdamSettings(beta1=0.9, beta2=0.95, eps=EPS, clip=1.0)
    return ZeroEngine(model, stage=case.stage, adam=adam, micro_batch_size=MICRO_BATCH, sequence_length=SEQUENCE)


def micro_batches(step: int) -> list[torch.Tensor]:
    """This data-parallel rank's part of the global batch of a step."""
    from megatron.core import parallel_state

    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return list(tokens(GLOBAL_BATCH, seed=1000 + step).chunk(ranks)[rank].split(MICRO_BATCH))


def take_step(engine, step: int, lr: float = LR):
    batches = micro_batches(step)
    return engine.train_step(iter(batches), len(batches), lr, DECAY)


def train(case: Case) -> History:
    """Collective over the world."""
    with layout(case.tensor, case.pipeline, case.sequence) as parallel, _without_reset(case.without_reset):
        engine = make_engine(case, parallel)
        results = [take_step(engine, step) for step in range(case.steps)]
        weights = gather(engine.model)
        return History([r.loss for r in results], [r.grad_norm for r in results], weights, engine.ternary.refreshes)


def train_all(rank: int, cases: list[Case]) -> dict[Case, History]:
    """For `run_distributed`."""
    return {case: train(case) for case in cases}


@contextlib.contextmanager
def _without_reset(wanted: bool) -> Iterator[None]:
    from megatron_qsparse.parallel.schedule import ScheduledModel

    with mock.patch.object(ScheduledModel, "_before_backward", lambda self, grad: None) if wanted else contextlib.nullcontext():
        yield


def train_plainly(rank: int, cases: list[Case]) -> dict[Case, History]:
    """The same runs on one rank without DeepSpeed, Megatron's schedule or our engine: accumulate, clip, AdamW.

    bf16 by hand: fp32 master weights, gradients of the bf16 model summed in fp32.
    """
    return {case: _train_plainly(case) for case in cases}


def _train_plainly(case: Case) -> History:
    from megatron_qsparse.layers.ternary import TernaryWeights

    with layout() as parallel:
        model = build(case.variant, parallel, dtype=DTYPES[case.precision])
        ternary = TernaryWeights(model.modules())
        params = list(model.parameters())
        masters = [param.detach().float().clone().requires_grad_() for param in params]
        groups = [
            {"params": [m for m in masters if m.dim() > 1], "weight_decay": DECAY},
            {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=EPS, fused=True)
        history = History([], [])
        positions = torch.arange(SEQUENCE).expand(MICRO_BATCH, -1)
        for step in range(case.steps):
            for master in masters:
                master.grad = torch.zeros_like(master)
            total = 0.0
            batches = micro_batches(step)
            for batch in batches:
                losses = model(batch[:, :-1].contiguous(), positions, None, labels=batch[:, 1:].contiguous())
                loss = losses.float().mean()
                (loss / len(batches)).backward()
                total += loss.item() / len(batches)
                for param, master in zip(params, masters, strict=True):
                    master.grad += param.grad.float()
                    param.grad = None
            norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            with torch.no_grad():
                for param, master in zip(params, masters, strict=True):
                    param.copy_(master)
            ternary.invalidate()
            history.losses.append(total)
            history.norms.append(norm.item())
        history.weights = gather(model)
        return history
