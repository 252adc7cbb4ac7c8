"""RMSNorm that permits sequence parallelism, and the sub-layer norm over a sharded width."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_qsparse.layers.collectives import reduce_sum
from megatron_qsparse.ops.norms import rms_norm


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm behind Megatron's constructor. Megatron's WrappedTorchNorm refuses sequence parallelism, for which the
    weight only has to carry an attribute: its gradient is then summed over the tensor-parallel ranks.

    hidden_states: [sequence, batch, hidden_size].
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class SubLayerNorm(nn.Module):
    """RMSNorm over the full width of an input sharded over tensor-parallel ranks (SubLN, arXiv 2504.12285).

    hidden_states: [..., width / ranks]; the weight is sharded in the same way. One all-reduce of [..., 1] forward and one
    backward.
    """

    def __init__(self, width: int, local_width: int, eps: float, dtype: torch.dtype, group: torch.distributed.ProcessGroup):
        super().__init__()
        self.width, self.eps, self.group = width, eps, group
        self.weight = nn.Parameter(torch.ones(local_width, dtype=dtype))
        self.weight.tensor_model_parallel = group.size() > 1
        self.weight.partition_dim = 0
        self.weight.partition_stride = 1

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        reduce = None if self.group.size() == 1 else lambda total: reduce_sum(total, self.group)
        return rms_norm(hidden_states, self.weight, self.width, self.eps, reduce)
