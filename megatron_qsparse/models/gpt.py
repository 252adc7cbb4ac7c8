"""Megatron-Core's GPTModel from a ModelConfig: the configuration it needs, and this process's part of the network."""

import math

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_qsparse.config import BitNetConfig, ParallelConfig, QSparseConfig
from megatron_qsparse.layers.mlp import ACTIVATIONS
from megatron_qsparse.layers.specs import block_spec
from megatron_qsparse.models.chunks import PipelineChunks
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.initialization import initialize_by_name


def transformer_config(model: ModelConfig, parallel: ParallelConfig, dtype: torch.dtype, recompute: bool = False) -> TransformerConfig:
    """Megatron's configuration of a resolved ModelConfig (`apply_preset`).

    All fusions that need CUDA extensions are off: the same code runs on every device. Weights are created on the CPU, since
    `initialize_by_name` makes them equal for every layout.
    """
    experts = _expert_settings(model, parallel) if model.num_experts else {}
    recomputation = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    return TransformerConfig(
        num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads, num_query_groups=model.num_query_groups,
        normalization="RMSNorm", layernorm_epsilon=model.norm_eps, add_bias_linear=False,
        gated_linear_unit=True, activation_func=ACTIVATIONS[model.activation],
        attention_dropout=0.0, hidden_dropout=0.0, init_method_std=model.init_std,
        tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.chunks,
        expert_model_parallel_size=parallel.expert, sequence_parallel=parallel.sequence,
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True, perform_initialization=True, gradient_accumulation_fusion=False, masked_softmax_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False, persist_layer_norm=False,
        deallocate_pipeline_outputs=True, batch_p2p_comm=False, **recomputation, **experts,
    )  # fmt: skip


def _expert_settings(model: ModelConfig, parallel: ParallelConfig) -> dict:
    """Fields of TransformerConfig that make every MLP a mixture of experts.

    The load-balancing loss is the one of each sequence: Megatron's other kinds are those of a micro-batch or of the steps so
    far, and would change the network's training with the batch arithmetic of a layout. Nothing is ever dropped.
    """
    return {
        "num_moe_experts": model.num_experts, "moe_router_topk": model.moe_router_topk, "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_ffn_hidden_size or None,
        "moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_router_dtype": "fp32",
        # Of a single expert the softmax after the selection would be 1, without a gradient for the router.
        "moe_router_pre_softmax": model.moe_router_topk == 1,
        "moe_token_dispatcher_type": parallel.moe_token_dispatcher, "moe_grouped_gemm": False, "moe_permute_fusion": False,
    }  # fmt: skip


class _GPT(GPTModel):
    """Without Megatron's copy of a tied embedding to the last pipeline stage: `initialize_by_name` draws the same weight on
    both, and the copy needs a CUDA device (`weight.data.cuda()`, language_module.py line 244 in 0.16.1).
    """

    def _is_in_embd_group(self) -> bool:
        return False


def build_model(
    model: ModelConfig, qsparse: QSparseConfig, bitnet: BitNetConfig, parallel: ParallelConfig, *,
    sequence_length: int, dtype: torch.dtype, seed: int, device: torch.device, recompute: bool = False,
) -> GPTModel | PipelineChunks:  # fmt: skip
    """This rank's tensor-parallel shard of this rank's pipeline stage, with initial weights that no layout changes.

    Megatron's process groups must exist. The model maps (tokens [batch, sequence], position_ids, None, labels) to the loss of
    each token [batch, sequence], fp32; with an interleaved schedule it is `PipelineChunks`.
    """
    config = transformer_config(model, parallel, dtype, recompute)

    def build(chunk: int | None) -> GPTModel:
        gpt = _GPT(
            config, block_spec(config, qsparse, bitnet, chunk), vocab_size=model.vocab_size, max_sequence_length=sequence_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk), vp_stage=chunk,
            parallel_output=True, share_embeddings_and_output_weights=model.tied_embeddings,
            position_embedding_type="rope", rotary_base=model.rope_base,
        )  # fmt: skip
        initialize_by_name(gpt, seed, std=model.init_std, residual_std=model.init_std / math.sqrt(2 * model.num_layers))
        return gpt

    if parallel.chunks is None:
        return build(None).to(device)
    return PipelineChunks([build(chunk) for chunk in range(parallel.chunks)]).to(device)
