"""Names ranks that all others wait for: slow devices, and slow reading of data.

`megatron.core.utils.StragglerDetector` (0.16.1) is not used: it needs CUDA, rank 0 listens at a port of all interfaces where any
connection switches it, and its report is a line of minima and maxima over all pipeline stages, without a bound from which one is slow.
What it measures, events around forward passes, is `parallel.stopwatch` here.
"""

import os
import socket
import statistics
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from pretrain.trainer import Callback, StepReport, Trainer

PATIENCE = 3
"""Logged steps in a row in which a rank is slow before it is named: a busy moment is no fault."""
LEAST_S = 0.05
"""That a slow rank's forward passes take longer than usual: less is noise of small models."""
WAITING = 0.25
"""Part of a step that a rank waits for data more than others do, from which on it is named."""


@dataclass(frozen=True)
class Measured:
    """Of one rank in one step."""

    forward_s: float
    waited_s: float
    """For data."""
    stage: int
    """Pipeline stage: only ranks of the same one do the same."""


class WatchStragglers(Callback):
    """Measures the logged steps; the others cost nothing. Metric `perf/slowest_rank_ratio`: the slowest rank's forward passes over the
    median of its pipeline stage.

    factor: from which on a rank is slow; 0 switches all of this off.
    """

    doing = "comparing ranks"

    def __init__(self, factor: float, interval: int, device: torch.device):
        self.factor, self.interval, self.device = factor, interval, device
        self.in_a_row: dict[int, int] = {}
        self.named: set[int] = set()
        self.places: list[str] = []
        self._waited = 0.0
        self._measures = False

    def before_step(self, trainer: Trainer) -> None:
        step = trainer.state.step + 1
        logged = step % self.interval == 0 or step == trainer.config.train.steps
        self._measures = logged and self.factor > 0 and dist.get_world_size() > 1
        if self._measures:
            self._waited = trainer.progress.waited_s
            trainer.engine.stopwatch.start()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        if not self._measures:
            return
        own = (
            trainer.engine.stopwatch.stop(),
            trainer.progress.waited_s - self._waited,
            parallel_state.get_pipeline_model_parallel_rank(),
            report.seconds,
        )
        gathered = torch.zeros(dist.get_world_size(), len(own), dtype=torch.float64, device=self.device)
        dist.all_gather_into_tensor(gathered, torch.tensor([own], dtype=torch.float64, device=self.device))
        rows = gathered.tolist()
        measured = [Measured(forward, waited, int(stage)) for forward, waited, stage, _ in rows]
        # The same on all ranks, each of which has a time of its own for the step.
        found = slow(measured, self.factor, max(step_s for *_, step_s in rows))
        report.metrics["perf/slowest_rank_ratio"] = max(ratios(measured))
        self.in_a_row = {rank: self.in_a_row.get(rank, 0) + 1 for rank in found}
        lasting = {rank for rank, count in self.in_a_row.items() if count >= PATIENCE}
        if new := sorted(lasting - self.named):
            self._name(new, found)
        if dist.get_rank() == 0:
            for rank in sorted(self.named - lasting):
                print(f"slow no more: rank {rank} ({self.places[rank]})", flush=True)
        self.named = lasting

    def _name(self, ranks: list[int], found: dict[int, str]) -> None:
        if not self.places:
            self.places = [""] * dist.get_world_size()
            dist.all_gather_object(self.places, f"{socket.gethostname()}, local rank {os.environ.get('LOCAL_RANK', '0')}")
        if dist.get_rank() == 0:
            for rank in ranks:
                print(f"slow: rank {rank} ({self.places[rank]}): {found[rank]}", flush=True)


def ratios(measured: list[Measured]) -> list[float]:
    """Each rank's forward passes over the median of its pipeline stage."""
    usual = {stage: statistics.median_low(m.forward_s for m in measured if m.stage == stage) for stage in {m.stage for m in measured}}
    return [m.forward_s / usual[m.stage] if usual[m.stage] > 0 else 1.0 for m in measured]


def slow(measured: list[Measured], factor: float, step_s: float) -> dict[int, str]:
    """rank -> what is slow about it. Of an even number the lower median is taken: of two ranks the faster one is what is usual."""
    usually = {stage: statistics.median_low(m.waited_s for m in measured if m.stage == stage) for stage in {m.stage for m in measured}}
    found = {}
    for rank, (own, ratio) in enumerate(zip(measured, ratios(measured), strict=True)):
        texts, waited = [], usually[own.stage]
        usual = own.forward_s / ratio
        if ratio > factor and own.forward_s - usual > LEAST_S:
            texts.append(f"its forward passes take {ratio:.1f} x the median of its pipeline stage ({own.forward_s:.3f} s, {usual:.3f} s)")
        if own.waited_s - waited > max(LEAST_S, WAITING * step_s):
            texts.append(f"it waits {own.waited_s:.3f} s a step for data, the median is {waited:.3f} s")
        if texts:
            found[rank] = "; ".join(texts)
    return found
