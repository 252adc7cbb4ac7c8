"""Core attention by torch's scaled_dot_product_attention, in the slot where Megatron's layer spec expects it."""

import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class SDPAttention(MegatronModule):
    """Causal attention; runs on any device, and with sequence parallelism on CPU, where Megatron's own core attention needs CUDA.

    query: [sequence, batch, heads, head_dim]; key, value: [sequence, batch, query groups, head_dim].
    Returns [sequence, batch, heads * head_dim]. Only causal masks are supported: any explicit mask is refused.
    """

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None, **_):
        super().__init__(config=config)
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, packed_seq_params=None, **_) -> Tensor:
        if attention_mask is not None or packed_seq_params is not None:
            raise ValueError("SDPAttention is causal: attention_mask and packed_seq_params must be None")
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        context = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True, scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )  # fmt: skip
        return context.permute(2, 0, 1, 3).flatten(2)
