"""The configuration of a run: one dataclass per component, read from YAML and the command line by jsonargparse.

    torchrun --nproc-per-node 2 -m pretrain.train --config pretrain/configs/tiny_qsparse.yaml --optimizer.lr 1e-3

A misspelt key is an error, see `pretrain.arguments`. Importing this module is cheap; torch is not needed to read, print or validate a
configuration.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_qsparse.config import BitNetConfig, ParallelConfig, QSparseConfig
from megatron_qsparse.models.config import ModelConfig
from pretrain.tracking.tracker import TrackingConfig

FORMAT_VERSION = 1
"""Of config.yaml as saved in run directories and checkpoints."""


class ConfigurationError(ValueError):
    """One or more settings cannot work; the message has a line for each."""


@dataclass(kw_only=True)
class ZeroConfig:
    """DeepSpeed ZeRO: what is sharded over the data-parallel ranks."""

    stage: int = 1
    """1: optimizer states and fp32 master weights. 2: gradients as well. 3: weights as well, only without pipeline stages."""


@dataclass(kw_only=True)
class DataConfig:
    """Tokenized shards made by `python -m data_tools tokenize`."""

    path: str = ""
    """Directory of the shards and their manifest.json."""
    sequence_length: int = 2048
    """Tokens of a training sample."""
    window_shards: int = 2
    """Shards whose samples are shuffled together; more is a better shuffle and more open files. Part of the sample order."""
    workers: int = 0
    """Reader processes per rank; 0 reads in the training process, which suffices for local disks."""


@dataclass(kw_only=True)
class TrainConfig:
    """What is trained, for how long, in which precision."""

    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Seed of initial weights and sample order."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one data-parallel rank."""
    global_batch_size: int = 8
    """Samples of one optimizer step over all ranks; what one rank does not hold at once is accumulated."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights and accumulates gradients in fp32."""
    deterministic: bool = False
    """Deterministic GPU kernels, at a price in speed. CPU runs are deterministic at a fixed number of threads."""
    recompute: bool = False
    """Recompute each layer's activations in the backward instead of keeping them."""
    check_codes: bool = False
    """Before each step, verify that no weight was written without its ternary codes being made anew. For debugging."""
    max_skipped_steps: int = 10
    """Steps in a row whose loss or gradient is not finite, after which the run stops. Such a step changes no weight, no moment and
    not Adam's count; its samples count as consumed, and the learning rate goes on. No interval's checkpoint is written behind it."""
    hang_timeout_s: float = 1800.0
    """Seconds without progress (a micro-batch read, a step, a validation, a save) after which each rank says where it is, with its
    stack, and the run ends with an error that names the ranks the others wait for. A rank without any sign of life for 45 s ends it
    too. 0 waits for ever for either."""
    straggler_factor: float = 1.5
    """At logged steps the ranks compare the times of their forward passes. One that takes this many times the median of its pipeline
    stage, in three of these steps in a row, is named with its machine; so is one that waits for data. 0 switches it off, else > 1."""
    log_interval: int = 10
    """Steps between two progress lines and journal entries; sparsity is measured at these steps."""


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norm weights have none."""
    clip: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 disables clipping."""


@dataclass(kw_only=True)
class ScheduleConfig:
    """Learning rate (and weight decay) over the steps."""

    kind: Literal["cosine", "linear", "polynomial", "wsd", "two_stage"] = "cosine"
    """After the warm-up: cosine, linear or polynomial decay to `min_lr`; "wsd": constant, then linear decay over the last
    `decay_steps`; "two_stage" (BitNet): linear decay from optimizer.lr that changes, half-way, to the one from `second_lr`
    and to no weight decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    min_lr: float = 0.0
    """Learning rate that the decay ends at (cosine, linear, polynomial, wsd)."""
    power: float = 1.0
    """Exponent of "polynomial"."""
    decay_steps: int = 0
    """Steps of the final decay of "wsd"."""
    second_lr: float = 0.0
    """Peak of the second stage of "two_stage"."""


@dataclass(kw_only=True)
class ValidationConfig:
    """Loss on held-out samples, the same ones for every run and layout."""

    interval: int = 0
    """Steps between validations; 0 validates after the last step only."""
    samples: int = 256
    """Evenly spaced samples of the validation split; rounded down to a multiple of train.global_batch_size, of which it is at least one."""


@dataclass(kw_only=True)
class SpikeConfig:
    """Loss spikes: a loss above the median of the recent ones by `threshold` robust deviations and by `min_increase`, several steps
    in a row. Every rank decides alike, from the global loss, and a resumed run as an unbroken one."""

    action: Literal["off", "warn", "rollback", "stop"] = "warn"
    """warn: tell, log `train/spike` and keep the batches. rollback: go back to a checkpoint from before the spike and go on behind its
    samples, which are left out (PaLM, section 5.1). stop: end the run with an error."""
    window: int = 128
    """Steps whose losses the median and its deviation are taken of, at least 8; none is judged before there are so many."""
    threshold: float = 6.0
    """Deviations (1.4826 median absolute deviations, the standard deviation of a normal distribution) above the median, > 0."""
    min_increase: float = 0.3
    """Nat above the median that a spike has at least, however quiet the losses were; >= 0."""
    patience: int = 3
    """Steps in a row above both bounds that make a spike."""
    rollback_steps: int = 100
    """rollback: steps between the checkpoint that is taken and the beginning of the spike, at least. checkpoint.keep_last and
    checkpoint.interval must reach that far back."""
    max_rollbacks: int = 3
    """rollback: roll-backs of a run, over all its restarts; the next spike stops it."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints in OUTPUT_DIR/checkpoints."""

    interval: int = 0
    """Steps between checkpoints; 0 saves after the last step and on a signal only."""
    keep_last: int = 2
    """Checkpoints kept; older ones are removed after a newer one is complete."""
    max_failures: int = 3
    """Saves in a row that may fail, say for want of space: each is warned of and tried again at the next interval; then the run stops.
    A last save that fails is tried once more and ends the run with an error."""
    asynchronous: bool = True
    """Go on training while a checkpoint is written: training waits for a copy in host memory only, about 1/data-parallel-size of
    a rank's weights and optimizer state, which exists until the files are written. On GPUs the copy is page-locked, which takes up
    to twice that and is kept for the next save; what no rank holds whole (all weights and states at zero.stage=3) is put together
    beside it, once more that. false waits for the files too. The run is the same bit for bit."""
    milestone_interval: int = 0
    """Steps between checkpoints of the weights alone, which are kept for ever and from which an evaluation or another run can
    start; 0 writes none."""
    start_from: str = ""
    """A checkpoint, a milestone, or a run directory, whose newest is taken: a run that has nothing to resume begins with its
    weights, at step 0 and with a fresh optimizer. It must hold the same network (shape, K, N:M, quantization, tokenizer)."""


@dataclass(kw_only=True)
class NotifyConfig:
    """Telling somebody what happens to the run."""

    command: str = ""
    """Shell command run at a failure, a stall, a loss spike and the finish; "" runs none. It finds QSPARSE_EVENT (failure, stall, spike,
    finish), QSPARSE_RUN, QSPARSE_RUN_DIR, QSPARSE_STEP and QSPARSE_MESSAGE in its environment; its output goes to RUN_DIR/notify.log.
    Training does not wait for it. It is saved with the configuration, in MLflow too: keep a secret in a file that it reads."""
    timeout_s: float = 60.0
    """Seconds after which the command is killed."""


@dataclass(kw_only=True)
class PretrainConfig:
    """A pretraining run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    qsparse: QSparseConfig = field(default_factory=QSparseConfig)
    bitnet: BitNetConfig = field(default_factory=BitNetConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    output_dir: str = ""
    """Run directory: config.yaml, metrics.jsonl, checkpoints/, run_id. Training goes on from the newest complete checkpoint
    in it. Unset: runs/<tracking.run_name>."""
    resume: Literal["auto", "never", "required"] = "auto"
    """auto goes on from the newest complete checkpoint of the run directory where there is one. never refuses a directory with
    checkpoints. required refuses one without: for jobs that are started again."""
    allow_change: str = ""
    """Settings that may differ from those of the checkpoint that the run goes on from: names (train.steps) or sections (schedule),
    with commas between them. Needed for everything that changes what is trained: optimizer, schedule, number of steps. Layout,
    intervals and places may always change; model, data, seed and quantization never."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a device."""
    format_version: int = FORMAT_VERSION
    """Of this file; written by the program."""

    @property
    def run_directory(self) -> Path:
        return Path(self.output_dir or f"runs/{self.tracking.run_name or 'default'}")


def parse(args: list[str] | None = None, prog: str | None = None, description: str | None = None) -> PretrainConfig:
    """Read `--config FILE` and dotted flags, which win. Raises ConfigurationError naming each key or value that does not fit."""
    from pretrain import arguments

    return arguments.parse(args, prog, description)


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    """Nested plain values, as saved in config.yaml."""
    return dataclasses.asdict(config)


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"qsparse": {"keep": 0.4}} -> {"qsparse.keep": 0.4}; lists stay values."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def dump_yaml(config: PretrainConfig) -> str:
    """What `--config` reads back."""
    from pretrain.yaml_text import dump

    return dump(to_dict(config))
