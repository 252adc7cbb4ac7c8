"""Layer specs: which class stands in which slot of Megatron's transformer, one spec per layer of this pipeline stage."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules, get_transformer_layer_offset

from megatron_qsparse.compat.megatron import mlp_spec
from megatron_qsparse.config import ROW_PROJECTIONS, BitNetConfig, QSparseConfig, resolve
from megatron_qsparse.layers.attention import SDPAttention
from megatron_qsparse.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
from megatron_qsparse.layers.moe import moe_spec
from megatron_qsparse.layers.norm import RMSNorm


def block_spec(
    config: TransformerConfig, qsparse: QSparseConfig | None = None, bitnet: BitNetConfig | None = None, chunk: int | None = None
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline rank builds, with each projection's recipe resolved by its global layer number.

    None stands for dense and full precision. chunk: which of a stage's chunks under the interleaved schedule, else None.
    """
    qsparse, bitnet = qsparse or QSparseConfig(), bitnet or BitNetConfig()
    offset = get_transformer_layer_offset(config, chunk)
    layers = [_layer_spec(config, offset + local, qsparse, bitnet) for local in range(get_num_layers_to_build(config, chunk))]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _layer_spec(config: TransformerConfig, layer: int, qsparse: QSparseConfig, bitnet: BitNetConfig) -> ModuleSpec:
    attention_width = config.kv_channels * config.num_attention_heads
    experts, shared_width = config.num_moe_experts, config.moe_shared_expert_intermediate_size
    widths = {
        "attention.qkv": config.hidden_size, "attention.proj": attention_width,
        "mlp.gate_up": config.hidden_size, "mlp.down": config.moe_ffn_hidden_size if experts else config.ffn_hidden_size,
        "mlp.shared_gate_up": config.hidden_size, "mlp.shared_down": shared_width,
    }  # fmt: skip

    def linear(projection: str) -> ModuleSpec:
        settings = resolve(layer, config.num_layers, projection, widths[projection], qsparse, bitnet)
        kind = SparseRowParallelLinear if projection in ROW_PROJECTIONS else SparseColumnParallelLinear
        return ModuleSpec(module=kind, params={"settings": settings})

    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear("attention.qkv"),
            core_attention=SDPAttention,
            linear_proj=linear("attention.proj"),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    if experts:
        mlp = moe_spec(linear, shared=shared_width is not None)
    else:
        mlp = mlp_spec(MLPSubmodules(linear_fc1=linear("mlp.gate_up"), linear_fc2=linear("mlp.down")))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
