"""Megatron's two parallel linears with a sparse and, where wanted, quantized operand.

Both upstream classes hand (local input, weight) to `self._forward_impl`; overriding that one method leaves every collective
of theirs in place. The order of operations is fixed: SubLN -> top-K on the unquantized |x| -> l2 rescale -> int8.
"""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_qsparse.config import ProjectionSettings
from megatron_qsparse.layers.code_linear import CodeLinear
from megatron_qsparse.layers.collectives import reduce_max, reduce_sum
from megatron_qsparse.layers.global_topk import global_topk_mask
from megatron_qsparse.layers.meter import SparsityMeter
from megatron_qsparse.layers.norm import SubLayerNorm
from megatron_qsparse.layers.ternary import TernaryWeight
from megatron_qsparse.ops.norms import l2_rescale
from megatron_qsparse.ops.quantize import int8_absmax
from megatron_qsparse.ops.sparsify import sparsify
from megatron_qsparse.ops.topk import topk_mask


class _SparseLinear:
    """What both linears share. `settings` comes from the layer spec; without sparsity, BitNet or SubLN they are Megatron's own.

    Inside an expert `tp_group` is the expert tensor-parallel group, the input is [tokens routed here, features], possibly none,
    and Megatron's dispatcher does the communication around it.
    """

    input_is_sharded = False

    def __init__(self, *args, settings: ProjectionSettings, **kwargs):
        super().__init__(*args, **kwargs)
        if settings.quantized and (self.gradient_accumulation_fusion or self.bias is not None):
            raise ValueError(f"{settings.name}: a quantized linear needs gradient_accumulation_fusion=False and add_bias_linear=False")
        group = self.feature_group
        if settings.sparse and settings.mode != "global" and group is not None and settings.groups % group.size():
            raise ValueError(f"{settings.name}: its {settings.groups} slices cannot be divided among {group.size()} tensor-parallel ranks")
        self.settings = settings
        self.expert: int | None = None
        """Number of the expert among those of its layer, over all ranks; None outside of experts."""
        # Never a class attribute: it would hide the submodule of this name, which nn.Module finds by __getattr__ only.
        self.sub_norm: SubLayerNorm | None = None
        self.meter = SparsityMeter()
        self.ternary = TernaryWeight(self, settings.projection) if settings.quantized else None

    @property
    def feature_group(self) -> torch.distributed.ProcessGroup | None:
        """The ranks over which this linear's input features are spread; None where each rank has them all."""
        return self.tp_group if self.input_is_sharded and self.tp_group.size() > 1 else None

    def _forward_impl(self, input, weight, bias=None, *, sequence_parallel=False, allreduce_dgrad=False, **kwargs):
        x = input if self.sub_norm is None else self.sub_norm(input)
        if self.settings.sparse:
            x = self._sparsify(x)
        if self.settings.quantized:
            return self._multiply_codes(x, weight, sequence_parallel, allreduce_dgrad)
        self.meter.observe(x)
        return super()._forward_impl(
            x, weight, bias, sequence_parallel=sequence_parallel, allreduce_dgrad=allreduce_dgrad, **kwargs
        )  # fmt: skip

    def _sparsify(self, x: torch.Tensor) -> torch.Tensor:
        kept = sparsify(x, self.mask(x))
        if not self.settings.rescale:
            return kept
        group = self.feature_group
        return l2_rescale(kept, x, None if group is None else lambda total: reduce_sum(total, group))

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """The top-K mask of this rank's share of the input, bool [..., local width]; one meaning for every layout."""
        k, group = self.settings.k(self.input_size), self.feature_group
        if group is None:
            return topk_mask(x, k, self.settings.groups)
        if self.settings.mode == "global":
            return global_topk_mask(x, k, group)
        return topk_mask(x, k, self.settings.groups // group.size())

    def _multiply_codes(self, x, weight, sequence_parallel, allreduce_dgrad):
        group = self.feature_group
        codes, scale = int8_absmax(x, None if group is None else lambda local: reduce_max(local, group))
        self.meter.observe(codes)
        weight_codes, alpha = self.ternary.current()
        return CodeLinear.apply(x, weight, codes, scale, weight_codes, alpha, sequence_parallel, allreduce_dgrad, self.tp_group)


class SparseColumnParallelLinear(_SparseLinear, ColumnParallelLinear):
    """attention.qkv, mlp.gate_up and mlp.shared_gate_up: outputs are sharded, the input's features are whole on every rank.

    With sequence parallelism the input is [sequence / ranks, batch, hidden]: mask and scale are per token, so they are taken
    on the shard, before the all-gather.
    """


class SparseRowParallelLinear(_SparseLinear, RowParallelLinear):
    """attention.proj, mlp.down and mlp.shared_down: the input's features are sharded, input [sequence, batch, width / ranks],
    in an expert [tokens, width / ranks].
    """

    input_is_sharded = True

    def __init__(self, *args, settings: ProjectionSettings, **kwargs):
        super().__init__(*args, settings=settings, **kwargs)
        if settings.subln:
            self.sub_norm = SubLayerNorm(
                self.input_size, self.input_size_per_partition, self.config.layernorm_epsilon, self.config.params_dtype, self.tp_group
            )
            # Whether it is an expert's, on more than one expert-parallel rank: DeepSpeed reduces those over other ranks.
            self.sub_norm.weight.allreduce = self.weight.allreduce

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Weight sharded along axis 1, SubLN's along axis 0."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 1, "sub_norm.weight": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
