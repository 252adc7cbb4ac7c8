"""A configuration on so many processes, as accounting sees it. Imports no torch."""

from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.memory import Layout, Memory, memory_per_rank
from pretrain.config import PretrainConfig


def layout_of(config: PretrainConfig, world_size: int) -> Layout:
    """How the run is spread. The batch may not divide: then the micro-batches of a rank are rounded down, to at least one."""
    parallel, train = config.parallel, config.train
    data = max(1, world_size // (parallel.tensor * parallel.pipeline))
    return Layout(
        tensor=parallel.tensor, pipeline=parallel.pipeline, data=data, virtual_pipeline=parallel.virtual_pipeline,
        sequence=parallel.sequence, expert=parallel.expert, zero_stage=config.zero.stage, recompute=train.recompute,
        micro_batches=max(1, train.global_batch_size // (train.micro_batch_size * data)),
    )  # fmt: skip


def memory_of(config: PretrainConfig, world_size: int, model: ModelConfig) -> Memory:
    """Of the fullest rank; model: resolved. Raises ValueError where it cannot be known, see `memory_per_rank`."""
    layout, train = layout_of(config, world_size), config.train
    return memory_per_rank(
        model, layout, config.qsparse, config.bitnet, train.precision, train.micro_batch_size, config.data.sequence_length
    )
