"""What each number may be by itself. A new field of a number needs its line here; tests/pretrain/test_wrong_configs.py asks for it.

Not here: zero.stage, whose values have reasons of their own, the fields of `tracking`, which checks itself wherever it is used, and
the fractions in qsparse.recipe (`megatron_qsparse.config.problems`).
"""

import math
from dataclasses import dataclass
from operator import attrgetter

from pretrain.config import FORMAT_VERSION, PretrainConfig

INT_MAX = 2**31 - 1
FLOAT_MAX = 1e38
"""About the largest number of fp32, which is what optimizers and kernels compute with."""


@dataclass(frozen=True)
class Range:
    """low .. high, both included unless they are open."""

    low: float
    high: float = INT_MAX
    open_low: bool = False
    open_high: bool = False
    note: str = ""
    """Said behind the range."""

    def problem(self, name: str, value: float) -> str | None:
        """None where the value lies inside; NaN lies nowhere."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if above and below:
            return None
        return f"{name}={value} must {self._needed(value, above)}{f': {self.note}' if self.note else ''}"

    def _needed(self, value: float, above: bool) -> str:
        if isinstance(value, int) and isinstance(self.high, int) and not self.open_high:
            return f"be at most {self.high}" if above else f"be at least {self.low}" if self.low else "not be negative"
        if self.high == FLOAT_MAX:
            finite = "" if math.isfinite(value) and not above else f", and at most {self.high:g}"
            return ("be larger than 0" if self.open_low else "not be negative") + finite
        return f"lie in {'[('[self.open_low]}{self.low:g}, {self.high:g}{'])'[self.open_high]}"


COUNT, NOT_NEGATIVE = Range(1), Range(0, FLOAT_MAX)
STEPS = Range(0)
"""A number of steps of which 0 means none."""
FRACTION = Range(0, 1.0, open_high=True)
LAYERS, WIDTH = Range(1, 2**16), Range(1, 2**24)

RANGES = {
    "model.num_layers": LAYERS, "model.hidden_size": WIDTH, "model.ffn_hidden_size": WIDTH, "model.num_attention_heads": LAYERS,
    "model.num_query_groups": LAYERS, "model.vocab_size": Range(1, 2**30), "model.vocab_multiple": Range(1, 2**20),
    "model.rope_base": Range(1, 1e15), "model.norm_eps": Range(0, 1.0, open_low=True, note="0 divides by zero where a token is all zeros"),
    "model.init_std": Range(0, 100.0, open_low=True, note="weights that are all 0 stay 0"), "model.num_experts": Range(0, 2**16),
    "model.moe_router_topk": LAYERS, "model.moe_ffn_hidden_size": WIDTH, "model.moe_shared_expert_ffn_hidden_size": Range(0, 2**24),
    "model.moe_aux_loss_coeff": NOT_NEGATIVE,
    "qsparse.keep": Range(0, 1.0, open_low=True, note="the kept fraction; 1.0 is dense"),
    "qsparse.groups": WIDTH, "qsparse.block_n": WIDTH, "qsparse.block_m": WIDTH,
    "parallel.tensor": COUNT, "parallel.pipeline": COUNT, "parallel.virtual_pipeline": COUNT, "parallel.expert": COUNT,
    "data.sequence_length": Range(1, 2**26), "data.window_shards": COUNT,
    "data.workers": Range(0, 1024, note="reader processes of one rank"),
    "train.steps": COUNT, "train.seed": Range(0, 2**63 - 1), "train.micro_batch_size": COUNT, "train.global_batch_size": COUNT,
    "train.max_skipped_steps": COUNT, "train.log_interval": COUNT,
    "train.hang_timeout_s": Range(0, 1e7, note="seconds; 0 waits for ever"),
    "train.straggler_factor": Range(0, 1000.0, note="times the median; 0 switches it off"),
    "spike.window": Range(8), "spike.threshold": Range(0, FLOAT_MAX, open_low=True), "spike.min_increase": NOT_NEGATIVE,
    "spike.patience": COUNT, "spike.rollback_steps": STEPS, "spike.max_rollbacks": COUNT,
    "optimizer.lr": NOT_NEGATIVE, "optimizer.beta1": FRACTION, "optimizer.beta2": FRACTION,
    "optimizer.eps": Range(0, 1.0, open_low=True, note="0 divides by zero where a gradient is 0"),
    "optimizer.weight_decay": NOT_NEGATIVE, "optimizer.clip": NOT_NEGATIVE,
    "schedule.warmup_steps": STEPS, "schedule.min_lr": NOT_NEGATIVE, "schedule.power": Range(0, 1000.0, open_low=True),
    "schedule.decay_steps": STEPS, "schedule.second_lr": NOT_NEGATIVE,
    "validation.interval": STEPS, "validation.samples": COUNT,
    "checkpoint.interval": STEPS, "checkpoint.keep_last": COUNT, "checkpoint.max_failures": COUNT, "checkpoint.milestone_interval": STEPS,
    "notify.timeout_s": Range(0, 86400.0, open_low=True, note="seconds"),
    "format_version": COUNT,
}  # fmt: skip


def problems(config: PretrainConfig) -> dict[str, str]:
    """A line for each number outside of its range, by its name. What is unset comes from the preset."""
    values = {name: attrgetter(name)(config) for name in RANGES}
    found = {name: problem for name, value in values.items() if value is not None and (problem := RANGES[name].problem(name, value))}
    if 0 < config.train.straggler_factor <= 1:
        found["train.straggler_factor"] = (
            f"train.straggler_factor={config.train.straggler_factor} must be larger than 1, or 0: ranks that are as fast as the others "
            "would be slow"
        )
    if config.format_version > FORMAT_VERSION:
        found["format_version"] = (
            f"format_version={config.format_version} was written by a newer version of this project, which reads up to {FORMAT_VERSION}: "
            "upgrade megatron-qsparse"
        )
    return found
