"""DeepSpeed ZeRO around Megatron's schedule: Megatron owns layers, groups and micro-batches, DeepSpeed the optimizer over DP."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from megatron_qsparse.compat import deepspeed
from megatron_qsparse.layers.expert_meter import ExpertMeters
from megatron_qsparse.layers.meter import SparsityMeters
from megatron_qsparse.layers.ternary import TernaryWeights
from megatron_qsparse.parallel.expert_groups import optimizer_groups, register_experts
from megatron_qsparse.parallel.gradients import install_sequence_parallel_hooks, reduce_shared_embedding, shared_embedding
from megatron_qsparse.parallel.groups import ModelParallelUnit
from megatron_qsparse.parallel.partition import PartitionSettings, gathered
from megatron_qsparse.parallel.schedule import run_micro_batches, scheduled_models
from megatron_qsparse.parallel.stopwatch import Stopwatch

SUPPORTED_STAGES = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """AdamW; the learning rate and weight decay come with every step."""

    beta1: float
    beta2: float
    eps: float
    clip: float
    """Global gradient norm above which gradients are scaled down; 0 disables clipping."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    loss: float
    """Mean loss per token over the whole global batch, nat; the same number on every rank."""
    grad_norm: float
    """Global l2 norm of the gradient before clipping; inf where it was not finite."""
    applied: bool
    """False where the gradient was not finite and the optimizer left the weights alone."""


class ZeroEngine:
    """A model under ZeRO. bf16 keeps fp32 master weights and accumulates gradients in fp32.

    model: from `build_model`, on its device. stage: 1, 2 or 3. Weight decay applies to matrices, not to norm weights.
    check_codes: before each step, raise RuntimeError where a weight was written and its ternary codes are stale.
    partition: for stage 3, where the model's parameters are empty between steps (see `parallel.partition`).
    """

    def __init__(
        self, model: nn.Module, *, stage: int, adam: AdamSettings, micro_batch_size: int, sequence_length: int,
        check_codes: bool = False, partition: PartitionSettings | None = None,
    ):  # fmt: skip
        if stage not in SUPPORTED_STAGES:
            raise ValueError(f"ZeRO stage {stage}: supported stages are {SUPPORTED_STAGES}")
        if stage == 3 and parallel_state.get_pipeline_model_parallel_world_size() > 1:
            # partitioned_param_coordinator.py reset_step -> assert_ints_same_as_other_ranks (DeepSpeed 0.19.8): a broadcast over all
            # ranks, while the next stage waits for this one's activations.
            raise ValueError("ZeRO stage 3 and pipeline stages wait for each other for ever: each forward of stage 3 begins with a "
                             "comparison over all ranks, before later pipeline stages have begun; use stage 1 or 2")  # fmt: skip
        self._shared_embedding = shared_embedding(model)
        if self._shared_embedding is not None and stage == 2:
            raise ValueError("tied embeddings over pipeline stages need ZeRO stage 1: stage 2 has scattered their gradients by then")
        self.model, self.stage, self.check_codes = model, stage, check_codes
        self.micro_batch_size, self.sequence_length = micro_batch_size, sequence_length
        self.device = next(model.parameters()).device
        self.ternary = TernaryWeights(model.modules(), gathered=gathered if stage == 3 else None)
        self.meters = SparsityMeters(model.modules(), self.device)
        self.expert_meters = _expert_meters(model, self.device)
        register_experts(model)
        if model.config.sequence_parallel:
            install_sequence_parallel_hooks(model)
        model.config.finalize_model_grads_func = self._finalize_gradients
        self.engine = deepspeed.initialize(
            model=model, optimizer=self._adamw(adam), mpu=ModelParallelUnit(), dist_init_required=False,
            config=self._deepspeed_config(adam.clip, partition or PartitionSettings()),
        )  # fmt: skip
        self.stopwatch = Stopwatch(self.device)
        """Of the forward passes."""
        self._scheduled = scheduled_models(self.engine, model, self.stopwatch)

    @property
    def optimizer(self):
        """DeepSpeed's ZeRO optimizer; its `.optimizer` is the AdamW over flat fp32 partitions."""
        return self.engine.optimizer

    def _adamw(self, adam: AdamSettings) -> torch.optim.AdamW:
        params = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {**group, "decay": decay}
            for decay in (True, False)
            for group in optimizer_groups([p for p in params if (p.dim() > 1) == decay])
        ]
        return torch.optim.AdamW(
            groups,
            lr=0.0,
            betas=(adam.beta1, adam.beta2),
            eps=adam.eps,
            weight_decay=0.0,
            fused=True,
        )

    def _deepspeed_config(self, clip: float, partition: PartitionSettings) -> dict:
        bf16 = self.model.config.params_dtype == torch.bfloat16
        # Buffers of this many elements are allocated: 1 or 2 GB by default, however small the model.
        zero = {"stage": self.stage, "reduce_bucket_size": min(500_000_000, sum(param.numel() for param in self.model.parameters()))}
        if self.stage == 3:
            zero |= partition.deepspeed_keys()
        return {
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            # The schedule accumulates; DeepSpeed must not count micro-batches (DeepSpeed issue 8183).
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "zero_optimization": zero,
            "gradient_clipping": clip,
            "steps_per_print": 1 << 60,
            # By default DeepSpeed rounds fp32 gradients to bf16 for the reduction, even on one data-parallel rank.
            "communication_data_type": "fp32",
            **({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}),
        }

    def train_step(self, batches: Iterator[torch.Tensor], num_micro_batches: int, lr: float, weight_decay: float) -> StepResult:
        """One optimizer step. batches yields this rank's micro-batches, int64 [micro_batch_size, sequence_length + 1]."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["decay"] else 0.0
        if self.check_codes:
            self.ternary.check()
        loss = self._run(batches, num_micro_batches, train=True)
        self.engine.step()
        self.weights_changed()
        grad_norm = self.engine.get_global_grad_norm()
        return StepResult(
            loss=_data_parallel_mean(loss), grad_norm=float(grad_norm), applied=not getattr(self.optimizer, "overflow", False)
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterator[torch.Tensor], num_micro_batches: int) -> float:
        """Mean loss per token of these micro-batches over all data-parallel ranks, nat; every rank must pass as many."""
        self.engine.eval()
        try:
            with self.meters.paused():
                return _data_parallel_mean(self._run(batches, num_micro_batches, train=False))
        finally:
            self.engine.train()
            if self.stage == 3:
                # DeepSpeed keeps or prefetches weights for a backward that does not come.
                self.optimizer.empty_partition_cache()

    @torch.no_grad()
    def master_shards(self) -> Iterator[torch.Tensor]:
        """This rank's flat fp32 tensors that AdamW steps. Stage 3 hands them to it one at a time: its parameter groups are empty."""
        if self.stage == 3:
            yield from self.optimizer.fp32_partitioned_groups_flat
        else:
            for group in self.optimizer.optimizer.param_groups:
                yield from group["params"]

    def weights_are_finite(self) -> bool:
        """Whether all master weights of all ranks are. Collective; reads every weight once."""
        # A sum is not finite where a summand is not; fp64 leaves no room for an overflow.
        sums = [shard.sum(dtype=torch.float64) for shard in self.master_shards() if shard.numel()]
        spoilt = torch.zeros((), dtype=torch.int32, device=self.device)
        if sums:
            spoilt += (~torch.isfinite(torch.stack(sums)).all()).to(torch.int32).to(self.device)
        dist.all_reduce(spoilt, op=dist.ReduceOp.MAX)
        return not spoilt.item()

    def weights_changed(self) -> None:
        """Weights were written (step, load, roll-back): ternary codes are made anew at the next forward."""
        self.ternary.invalidate()

    def _run(self, batches: Iterator[torch.Tensor], num_micro_batches: int, train: bool) -> torch.Tensor:
        self.ternary.refresh()
        return run_micro_batches(self._scheduled, batches, num_micro_batches, self.micro_batch_size, self.sequence_length, train)

    def _finalize_gradients(self, *_, **__) -> None:
        """Called by the schedule after the last backward; the data-parallel reduction is DeepSpeed's and happens in step()."""
        if self._shared_embedding is not None:
            reduce_shared_embedding(self._shared_embedding, self.optimizer)


def _expert_meters(model: nn.Module, device: torch.device) -> ExpertMeters | None:
    """None for a model without experts."""
    config = model.config
    if config.num_moe_experts is None:
        return None
    return ExpertMeters(model.modules(), config.num_layers, config.num_moe_experts, config.tensor_model_parallel_size, device)


def _data_parallel_mean(value: torch.Tensor) -> float:
    dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    if parallel_state.get_model_parallel_group().size() > 1:
        # Each tensor-parallel rank has reduced its own: decisions rest on it, and must not hang on a last bit.
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=parallel_state.get_model_parallel_group())
    return value.item() / parallel_state.get_data_parallel_world_size()
