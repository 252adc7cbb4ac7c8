"""Everything that cannot work in a configuration, in words, before any process group starts.

Nothing here imports torch: `python -m pretrain.plan` shows the same list.
"""

import dataclasses
import math
from dataclasses import dataclass

from data_tools.errors import ManifestError
from data_tools.manifest import Manifest
from megatron_qsparse.config import problems as sparsity_problems
from megatron_qsparse.models.accounting import projection_shapes, projection_widths
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.presets import apply_preset
from pretrain.changes import problems as change_problems
from pretrain.config import FORMAT_VERSION, PretrainConfig
from pretrain.start import problems as start_problems


class ConfigurationError(ValueError):
    """One or more settings cannot work; the message has a line for each."""


@dataclass(frozen=True)
class Validated:
    """A configuration together with what was found out while checking it."""

    config: PretrainConfig
    """With `config.model` filled in, as it is saved and tracked: a later change of a preset changes no old run."""
    model: ModelConfig
    manifest: Manifest
    data_parallel: int
    num_micro_batches: int
    """Of one rank in one optimizer step."""


def validate(config: PretrainConfig, world_size: int) -> Validated:
    """Raises ConfigurationError with every problem found."""
    problems, model, manifest = examine(config, world_size)
    if problems:
        raise ConfigurationError("\n".join(problems))
    data_parallel = world_size // (config.parallel.tensor * config.parallel.pipeline)
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * data_parallel)
    return Validated(dataclasses.replace(config, model=model), model, manifest, data_parallel, micro_batches)


def examine(config: PretrainConfig, world_size: int) -> tuple[list[str], ModelConfig | None, Manifest | None]:
    """(problems, resolved model or None, manifest or None)."""
    problems, manifest = _data_problems(config)
    problems += _range_problems(config)
    problems += _parallel_problems(config, world_size)
    problems += _schedule_problems(config)
    problems += _failure_problems(config)
    problems += config.tracking.problems()
    problems += change_problems(config)
    model = None
    try:
        model = apply_preset(config.model, manifest.vocab_size if manifest else None)
    except ValueError as error:
        # A vocabulary that only a missing manifest could tell is no second problem.
        if manifest is not None or config.model.vocab_size is not None or "vocab" not in str(error):
            problems.append(str(error))
    if model is not None:
        problems += _model_problems(config, model)
        problems += _expert_problems(config, model, world_size)
    if manifest is not None and not problems:
        # K and widths can be compared where they can be computed.
        problems += start_problems(config, model, manifest)
    return problems, model, manifest


def _data_problems(config: PretrainConfig) -> tuple[list[str], Manifest | None]:
    data = config.data
    if not data.path:
        return ["data.path is not set: name a directory made by `python -m data_tools tokenize`"], None
    try:
        manifest = Manifest.load(data.path)
        manifest.check_sizes("train")
        manifest.check_sizes("validation")
    except ManifestError as error:
        return [f"data.path: {error}"], None
    problems = []
    samples = config.train.global_batch_size
    for split in ("train", "validation"):
        # A lower bound of what the reader finds: each shard drops its remainder.
        found = sum(max(0, shard.tokens - 1) // max(1, data.sequence_length) for shard in manifest.shards_of(split))
        if found < samples:
            problems.append(f"data.path: the {split} split of {data.path} holds {found} samples of data.sequence_length="
                            f"{data.sequence_length}, fewer than train.global_batch_size={samples}: add data")  # fmt: skip
    return problems, manifest


def _range_problems(config: PretrainConfig) -> list[str]:
    at_least_one = {
        "train.steps": config.train.steps, "train.micro_batch_size": config.train.micro_batch_size,
        "train.global_batch_size": config.train.global_batch_size, "train.log_interval": config.train.log_interval,
        "train.max_skipped_steps": config.train.max_skipped_steps,
        "data.sequence_length": config.data.sequence_length, "data.window_shards": config.data.window_shards,
        "parallel.tensor": config.parallel.tensor, "parallel.pipeline": config.parallel.pipeline,
        "parallel.virtual_pipeline": config.parallel.virtual_pipeline, "parallel.expert": config.parallel.expert,
        "checkpoint.keep_last": config.checkpoint.keep_last, "checkpoint.max_failures": config.checkpoint.max_failures,
        "validation.samples": config.validation.samples,
    }  # fmt: skip
    not_negative = {
        "train.seed": config.train.seed, "data.workers": config.data.workers, "validation.interval": config.validation.interval,
        "checkpoint.interval": config.checkpoint.interval, "checkpoint.milestone_interval": config.checkpoint.milestone_interval,
        "optimizer.lr": config.optimizer.lr, "optimizer.eps": config.optimizer.eps,
        "optimizer.weight_decay": config.optimizer.weight_decay, "optimizer.clip": config.optimizer.clip,
        "schedule.warmup_steps": config.schedule.warmup_steps, "schedule.decay_steps": config.schedule.decay_steps,
        "schedule.min_lr": config.schedule.min_lr, "schedule.second_lr": config.schedule.second_lr,
    }  # fmt: skip
    found = [f"{name}={value} must be at least 1" for name, value in at_least_one.items() if value < 1]
    found += [f"{name}={value} must not be negative" for name, value in not_negative.items() if not value >= 0]
    for name, beta in (("optimizer.beta1", config.optimizer.beta1), ("optimizer.beta2", config.optimizer.beta2)):
        if not 0 <= beta < 1:
            found.append(f"{name}={beta} must lie in [0, 1)")
    if config.format_version > FORMAT_VERSION:
        found.append(
            f"format_version={config.format_version} was written by a newer version of this project, which reads up to {FORMAT_VERSION}"
        )
    return found


def _failure_problems(config: PretrainConfig) -> list[str]:
    """Of spikes and time-outs."""
    spike, saved, found = config.spike, config.checkpoint, []
    if not config.train.hang_timeout_s >= 0:
        found.append(f"train.hang_timeout_s={config.train.hang_timeout_s} must not be negative; 0 waits for ever")
    for name, least in (("window", 8), ("patience", 1), ("rollback_steps", 0), ("max_rollbacks", 1)):
        if getattr(spike, name) < least:
            found.append(f"spike.{name}={getattr(spike, name)} must be at least {least}")
    if not 0 < spike.threshold < math.inf:
        found.append(f"spike.threshold={spike.threshold} must be a positive number")
    if not 0 <= spike.min_increase < math.inf:
        found.append(f"spike.min_increase={spike.min_increase} must be a number that is not negative")
    if spike.action == "rollback" and not found and saved.interval < 1:
        found.append("spike.action=rollback needs checkpoints to go back to: set checkpoint.interval")
    elif spike.action == "rollback" and not found:
        # At a step that finds a spike the oldest checkpoint kept lies at least keep_last - 1 intervals back.
        back = spike.rollback_steps + spike.patience
        needed = 1 + math.ceil(back / saved.interval)
        if saved.keep_last < needed:
            found.append(f"checkpoint.keep_last={saved.keep_last} of checkpoint.interval={saved.interval} steps does not reach the {back} "
                         f"steps back that spike.rollback_steps and spike.patience ask for: set checkpoint.keep_last={needed}")  # fmt: skip
    return found


def _parallel_problems(config: PretrainConfig, world_size: int) -> list[str]:
    parallel, train = config.parallel, config.train
    found = []
    stage = config.zero.stage
    if stage == 0:
        found.append("zero.stage=0 is not supported: DeepSpeed then allows no backward but its own, which Megatron's schedule cannot "
                     "use, and has no fp32 accumulation for bf16; stage 1 costs nothing more: use 1, 2 or 3")  # fmt: skip
    elif stage not in (1, 2, 3):
        found.append(f"zero.stage={stage} does not exist: use 1, 2 or 3")
    if stage == 3 and parallel.pipeline > 1:
        found.append(f"zero.stage=3 with parallel.pipeline={parallel.pipeline} would wait for ever: DeepSpeed compares all ranks at the "
                     "beginning of each forward, before later stages have begun theirs; use zero.stage=1 or 2")  # fmt: skip
    if parallel.sequence and parallel.tensor == 1:
        found.append("parallel.sequence=true has no effect with parallel.tensor=1: raise parallel.tensor or leave it out")
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        found.append(f"parallel.virtual_pipeline={parallel.virtual_pipeline} has no effect with parallel.pipeline=1: raise "
                     "parallel.pipeline or leave it out")  # fmt: skip
    if min(parallel.tensor, parallel.pipeline, train.micro_batch_size, train.global_batch_size) < 1:
        return found
    model_ranks = parallel.tensor * parallel.pipeline
    if world_size % model_ranks:
        return [*found, f"{world_size} processes cannot be divided into parallel.tensor={parallel.tensor} * "
                        f"parallel.pipeline={parallel.pipeline} = {model_ranks}: start a multiple of {model_ranks}"]  # fmt: skip
    data_parallel = world_size // model_ranks
    if train.global_batch_size % (train.micro_batch_size * data_parallel):
        at_once = train.micro_batch_size * data_parallel
        found.append(f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
                     f"{train.micro_batch_size} * {data_parallel} data-parallel ranks = {at_once}")  # fmt: skip
    elif parallel.virtual_pipeline > 1 and train.global_batch_size // (train.micro_batch_size * data_parallel) % parallel.pipeline:
        micro_batches = train.global_batch_size // (train.micro_batch_size * data_parallel)
        found.append(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs the {micro_batches} micro-batches of a rank to be a "
                     f"multiple of parallel.pipeline={parallel.pipeline}: change train.global_batch_size")  # fmt: skip
    if parallel.sequence and config.data.sequence_length % parallel.tensor:
        found.append(f"data.sequence_length={config.data.sequence_length} is not divisible by parallel.tensor={parallel.tensor}, "
                     "as parallel.sequence=true needs")  # fmt: skip
    return found


def _schedule_problems(config: PretrainConfig) -> list[str]:
    schedule, steps, found = config.schedule, config.train.steps, []
    if schedule.warmup_steps > steps:
        found.append(f"schedule.warmup_steps={schedule.warmup_steps} is longer than the run, train.steps={steps}")
    if schedule.min_lr > config.optimizer.lr >= 0:
        found.append(f"schedule.min_lr={schedule.min_lr} is above optimizer.lr={config.optimizer.lr}")
    uses = {
        "power": ("polynomial",),
        "decay_steps": ("wsd",),
        "second_lr": ("two_stage",),
        "min_lr": ("cosine", "linear", "polynomial", "wsd"),
    }
    defaults = type(schedule)()
    for name, kinds in uses.items():
        value = getattr(schedule, name)
        if value != getattr(defaults, name) and schedule.kind not in kinds:
            found.append(f"schedule.{name}={value} has no effect with schedule.kind={schedule.kind}; it belongs to {' and '.join(kinds)}")
    if schedule.kind == "wsd" and not 0 < schedule.decay_steps <= steps:
        found.append(f"schedule.decay_steps={schedule.decay_steps} must lie in 1 .. train.steps={steps} with schedule.kind=wsd")
    if schedule.kind == "wsd" and schedule.warmup_steps + schedule.decay_steps > steps:
        found.append(f"schedule.warmup_steps={schedule.warmup_steps} and schedule.decay_steps={schedule.decay_steps} overlap in "
                     f"train.steps={steps}: shorten one of them")  # fmt: skip
    if schedule.kind == "two_stage" and schedule.warmup_steps > steps // 2:
        found.append(f"schedule.warmup_steps={schedule.warmup_steps} reaches into the second stage, which begins at step {steps // 2}: "
                     "shorten it")  # fmt: skip
    if schedule.kind == "two_stage" and not 0 < schedule.second_lr <= config.optimizer.lr:
        found.append(
            f"schedule.second_lr={schedule.second_lr} must lie in (0, optimizer.lr={config.optimizer.lr}] with schedule.kind=two_stage"
        )
    if schedule.kind == "polynomial" and not schedule.power > 0:
        found.append(f"schedule.power={schedule.power} must be positive")
    return found


def _model_problems(config: PretrainConfig, model: ModelConfig) -> list[str]:
    parallel, found = config.parallel, []
    if min(parallel.tensor, parallel.pipeline) < 1:
        return found
    mlp = ("moe_ffn_hidden_size", "moe_shared_expert_ffn_hidden_size") if model.num_experts else ("ffn_hidden_size",)
    for name in ("num_attention_heads", *mlp, "vocab_size"):
        if getattr(model, name) % parallel.tensor:
            found.append(f"model.{name}={getattr(model, name)} is not divisible by parallel.tensor={parallel.tensor}")
    if model.num_query_groups % parallel.tensor and parallel.tensor % model.num_query_groups:
        found.append(f"model.num_query_groups={model.num_query_groups} and parallel.tensor={parallel.tensor}: one must divide the other")
    elif (outputs := projection_shapes(model)["attention.qkv"][0]) % parallel.tensor:
        found.append(f"{outputs} outputs of attention.qkv (model.num_attention_heads={model.num_attention_heads}, model.num_query_groups="
                     f"{model.num_query_groups}) are not divisible by parallel.tensor={parallel.tensor}")  # fmt: skip
    if model.num_layers % parallel.pipeline:
        found.append(f"model.num_layers={model.num_layers} is not divisible by parallel.pipeline={parallel.pipeline}")
    elif parallel.pipeline > 1 and model.num_layers % (parallel.pipeline * max(1, parallel.virtual_pipeline)):
        chunks = parallel.pipeline * parallel.virtual_pipeline
        found.append(f"model.num_layers={model.num_layers} is not divisible by parallel.pipeline={parallel.pipeline} * "
                     f"parallel.virtual_pipeline={parallel.virtual_pipeline} = {chunks} chunks")  # fmt: skip
    if model.tied_embeddings and parallel.pipeline > 1 and config.zero.stage == 2:
        found.append(f"zero.stage=2 cannot tie embeddings over parallel.pipeline={parallel.pipeline} stages "
                     "(model.tied_embeddings=true): it has scattered the gradients of the two copies before they can be added; "
                     "use zero.stage=1")  # fmt: skip
    return found + sparsity_problems(config.qsparse, config.bitnet, projection_widths(model), model.num_layers, parallel.tensor)


def _expert_problems(config: PretrainConfig, model: ModelConfig, world_size: int) -> list[str]:
    parallel, experts, found = config.parallel, model.num_experts, []
    if not experts:
        if parallel.expert > 1:
            found.append(f"parallel.expert={parallel.expert} has no effect with model.num_experts=0: set model.num_experts or leave it out")
        if parallel.moe_token_dispatcher != type(parallel)().moe_token_dispatcher:
            found.append(
                f"parallel.moe_token_dispatcher={parallel.moe_token_dispatcher} has no effect with model.num_experts=0: leave it out"
            )
        return found
    if config.zero.stage == 3 and parallel.expert > 1:
        found.append(f"zero.stage=3 is not supported with parallel.expert={parallel.expert}: DeepSpeed refuses experts that are spread "
                     "over ranks at that stage; use zero.stage=1 or 2, or parallel.expert=1")  # fmt: skip
    if parallel.tensor > 1 and not parallel.sequence:
        found.append(f"parallel.sequence=false with parallel.tensor={parallel.tensor} and model.num_experts={experts}: tensor-parallel "
                     "ranks would route the same tokens, so set parallel.sequence=true")  # fmt: skip
    if min(parallel.tensor, parallel.pipeline, parallel.expert) < 1:
        return found
    if experts % parallel.expert:
        found.append(f"model.num_experts={experts} is not divisible by parallel.expert={parallel.expert}")
    model_ranks = parallel.tensor * parallel.pipeline
    data_parallel = world_size // model_ranks
    if world_size % model_ranks == 0 and data_parallel % parallel.expert:
        found.append(f"parallel.expert={parallel.expert} does not divide the {data_parallel} data-parallel ranks of {world_size} processes "
                     f"with parallel.tensor={parallel.tensor} and parallel.pipeline={parallel.pipeline}")  # fmt: skip
    return found
