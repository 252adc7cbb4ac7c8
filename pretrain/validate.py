"""Everything that cannot work in a configuration, in words, before any process group starts.

Nothing here imports torch: `python -m pretrain.plan` shows the same list. Names and types were checked before, by `pretrain.settings`.
"""

import dataclasses
from dataclasses import dataclass

from data_tools.errors import ManifestError
from data_tools.manifest import Manifest
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.presets import apply_preset
from pretrain.changes import problems as change_problems
from pretrain.checkpoint.directory import CheckpointDirectory
from pretrain.config import ConfigurationError, PretrainConfig
from pretrain.going_on import resume_problem
from pretrain.start import problems as start_problems
from pretrain.validation import layout, ranges, schedule, spikes, texts


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
    numbers = ranges.problems(config)
    problems, manifest = _data_problems(config, counted=not numbers.keys() & {"train.global_batch_size", "data.sequence_length"})
    problems += [*numbers.values(), *texts.problems(config)]
    problems += layout.batch_problems(config, world_size)
    problems += schedule.problems(config)
    if not any(name.startswith(("spike.", "checkpoint.")) for name in numbers):
        problems += spikes.problems(config)
    problems += config.tracking.problems()
    problems += change_problems(config)
    model = None
    if not any(name.startswith("model.") for name in numbers):
        try:
            model = apply_preset(config.model, manifest.vocab_size if manifest else None)
        except ValueError as error:
            # A vocabulary that only a missing manifest could tell is no second problem.
            if manifest is not None or config.model.vocab_size is not None or "vocab" not in str(error):
                problems.append(str(error))
    if model is not None:
        problems += layout.model_problems(config, model)
        problems += layout.expert_problems(config, model, world_size)
        if not any(name.startswith("qsparse.") for name in numbers):
            problems += layout.projection_problems(config, model)
    problems += _resume_problems(config)
    if manifest is not None and not problems:
        # K and widths can be compared where they can be computed.
        problems += start_problems(config, model, manifest)
    return problems, model, manifest


def _data_problems(config: PretrainConfig, counted: bool) -> tuple[list[str], Manifest | None]:
    """counted: whether the samples of a batch can be compared with those that there are."""
    data = config.data
    if not data.path:
        return ["data.path is not set: name a directory made by `python -m data_tools tokenize`"], None
    if not texts.usable_path(data.path):
        return [], None
    try:
        manifest = Manifest.load(data.path)
        manifest.check_sizes("train")
        manifest.check_sizes("validation")
    except ManifestError as error:
        return [f"data.path: {error}"], None
    except OSError as error:
        return [f"data.path: {error}: check the path and its permissions"], None
    problems = []
    samples = config.train.global_batch_size
    for split in ("train", "validation") if counted else ():
        # A lower bound of what the reader finds: each shard drops its remainder.
        found = sum(max(0, shard.tokens - 1) // data.sequence_length for shard in manifest.shards_of(split))
        if found < samples:
            problems.append(f"data.path: the {split} split of {data.path} holds {found} samples of data.sequence_length="
                            f"{data.sequence_length}, fewer than train.global_batch_size={samples}: add data, or lower one of "
                            "these settings")  # fmt: skip
    return problems, manifest


def _resume_problems(config: PretrainConfig) -> list[str]:
    """The run looks again once it owns the directory."""
    if not texts.usable_path(str(config.run_directory)):
        return []
    directory = CheckpointDirectory(config.run_directory / "checkpoints", config.checkpoint.keep_last)
    try:
        problem = resume_problem(config, directory)
    except OSError as error:
        problem = f"output_dir: {error}: choose another output_dir"
    return [problem] if problem else []
