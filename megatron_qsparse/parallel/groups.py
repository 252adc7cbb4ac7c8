"""Process groups: torch.distributed by the launcher's environment, Megatron's groups on top, and DeepSpeed's view of them."""

import math
import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_qsparse.compat import cpu, moe
from megatron_qsparse.config import ParallelConfig


def initialize(parallel: ParallelConfig, device: torch.device, seed: int, timeout: timedelta | None = None) -> None:
    """Start torch.distributed (nccl or gloo; env:// as torchrun sets it) where it is not running, and Megatron's groups.

    timeout: after which a collective that does not end fails; None leaves it to the libraries (10 minutes for NCCL, else 30).

    Raises RuntimeError where the launcher's variables are missing.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and not dist.is_initialized():
        raise RuntimeError(f"{', '.join(missing)} not set: start with `torchrun --nproc-per-node N -m pretrain.train ...`")
    cpu.enable()
    moe.enable()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    minutes = {} if timeout is None else {"distributed_timeout_minutes": math.ceil(timeout.total_seconds() / 60)}
    parallel_state.initialize_model_parallel(
        parallel.tensor, parallel.pipeline, parallel.chunks, expert_model_parallel_size=parallel.expert, **minutes
    )
    # What nobody seeds would be another number in each process, and on GPUs the same in each run.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def destroy() -> None:
    """Leave every group; safe to call twice."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class ModelParallelUnit:
    """DeepSpeed's `mpu`, answered by Megatron's parallel_state.

    DeepSpeed also asks for names that Megatron lacks; these three are required. Its probes for sequence-parallel getters must
    keep failing: they would switch on another library's sequence parallelism.
    """

    def __getattr__(self, name):
        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        return parallel_state.get_model_parallel_group().rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(parallel_state.get_data_parallel_group())
