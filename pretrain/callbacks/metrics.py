"""Measures and logs: one progress line and one journal entry every `train.log_interval` steps."""

import resource

import torch
import torch.distributed as dist

from megatron_qsparse.models.accounting import activated_flops_per_token, activated_parameters, flops_per_token
from pretrain.hardware import peak_flops
from pretrain.tracking import Tracker
from pretrain.trainer import Callback, StepReport, Trainer
from pretrain.validate import Validated
from pretrain.words import duration, thousands


class LogMetrics(Callback):
    """Collects on all ranks; `tracker` is None on all but the tracking rank, which prints and logs."""

    doing = "logging"

    def __init__(self, run: Validated, tracker: Tracker | None, device: torch.device):
        self.run, self.tracker, self.device = run, tracker, device
        self.interval = run.config.train.log_interval
        self.flops = flops_per_token(run.model, run.config.data.sequence_length).total
        self.batch_tokens = run.config.train.global_batch_size * run.config.data.sequence_length
        self.peak_flops = peak_flops(device)
        self.seconds, self.steps = 0.0, 0

    def _is_logged(self, step: int) -> bool:
        return step % self.interval == 0 or step == self.run.config.train.steps

    def before_step(self, trainer: Trainer) -> None:
        if self._is_logged(trainer.state.step + 1):
            trainer.engine.meters.start()
            if trainer.engine.expert_meters is not None:
                trainer.engine.expert_meters.start()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        trainer.state.flops += self.flops * self.batch_tokens
        self.seconds += report.seconds
        self.steps += 1
        metrics = dict(report.metrics)
        if self._is_logged(report.step):
            metrics |= self._measure(trainer)
        elif not metrics and not trainer.at_end and report.failure is None:
            return
        metrics |= self._basics(trainer, report)
        if self.tracker is not None:
            self.tracker.log(metrics, step=report.step)
            print(progress_line(metrics, report.step, trainer.config.train.steps), flush=True)
        self.seconds, self.steps = 0.0, 0

    def _basics(self, trainer: Trainer, report: StepReport) -> dict[str, float]:
        state = trainer.state
        tokens_per_s = self.steps * self.batch_tokens / self.seconds
        metrics = {
            "train/loss": report.result.loss, "train/grad_norm": report.result.grad_norm, "train/lr": report.lr,
            "train/tokens": state.tokens, "train/flops": state.flops, "train/skipped_steps": state.skipped_steps,
            "perf/tokens_per_s": tokens_per_s, "perf/step_time_s": self.seconds / self.steps,
        }  # fmt: skip
        if self.peak_flops:
            metrics["perf/mfu"] = tokens_per_s * self.flops / (self.peak_flops * dist.get_world_size())
        return metrics

    def _measure(self, trainer: Trainer) -> dict[str, float]:
        """Sparsity of this step over all ranks and what follows from it; collective."""
        state, model = trainer.state, self.run.model
        sparsity, experts = trainer.engine.meters.stop(), trainer.engine.expert_meters
        activated = activated_parameters(model, sparsity)
        per_token = activated_flops_per_token(model, self.run.config.data.sequence_length, sparsity).total
        state.activated_flops += per_token * (state.tokens - state.measured_tokens)
        state.measured_tokens = state.tokens
        return {
            **{f"sparsity/{projection}": value for projection, value in sparsity.items()},
            "sparsity/overall": activated.sparsity,
            "model/activated_parameters": activated.total,
            "train/activated_flops": state.activated_flops,
            "perf/peak_memory_gib": self._peak_memory_gib(),
            **(experts.stop() if experts is not None else {}),
        }

    def _peak_memory_gib(self) -> float:
        """The largest of all ranks: allocated GPU memory, or the resident set of a CPU process."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        value = torch.tensor(peak / 2**30, dtype=torch.float64, device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return value.item()


def progress_line(metrics: dict[str, float], step: int, steps: int) -> str:
    """`step 1200/50000 2.4% | loss 2.913 | sparsity 0.601 | lr 1.20e-03 | grad norm 0.41 | 41.2k tok/s | mfu 38% | eta 3h12m`"""
    parts = [f"step {step}/{steps} {100 * step / steps:.1f}%", f"loss {metrics['train/loss']:.4f}"]
    if "val/loss" in metrics:
        parts.append(f"val loss {metrics['val/loss']:.4f}")
    if "sparsity/overall" in metrics:
        parts.append(f"sparsity {metrics['sparsity/overall']:.3f}")
    parts += [
        f"lr {metrics['train/lr']:.2e}",
        f"grad norm {metrics['train/grad_norm']:.2f}",
        f"{thousands(metrics['perf/tokens_per_s'])} tok/s",
    ]
    if "perf/mfu" in metrics:
        parts.append(f"mfu {100 * metrics['perf/mfu']:.0f}%")
    parts.append(f"eta {duration((steps - step) * metrics['perf/step_time_s'])}")
    return " | ".join(parts)
