"""How the processes share the model and the batch, and what of it cannot work."""

from megatron_qsparse.config import problems as sparsity_problems
from megatron_qsparse.config import resolve
from megatron_qsparse.models.accounting import projection_shapes, projection_widths
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.ops.counts import MAX_INPUTS
from pretrain.config import PretrainConfig


def batch_problems(config: PretrainConfig, world_size: int) -> list[str]:
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
    if world_size < 1:
        found.append(f"world_size={world_size}: the number of processes must be at least 1")
    if min(parallel.tensor, parallel.pipeline, train.micro_batch_size, train.global_batch_size, world_size) < 1:
        return found
    model_ranks = parallel.tensor * parallel.pipeline
    if world_size % model_ranks:
        return [*found, f"{world_size} processes cannot be divided into parallel.tensor={parallel.tensor} * "
                        f"parallel.pipeline={parallel.pipeline} = {model_ranks}: start a multiple of {model_ranks}"]  # fmt: skip
    data_parallel = world_size // model_ranks
    if train.global_batch_size % (train.micro_batch_size * data_parallel):
        at_once = train.micro_batch_size * data_parallel
        found.append(f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
                     f"{train.micro_batch_size} * {data_parallel} data-parallel ranks = {at_once}: change one of them")  # fmt: skip
    elif parallel.virtual_pipeline > 1 and train.global_batch_size // (train.micro_batch_size * data_parallel) % parallel.pipeline:
        micro_batches = train.global_batch_size // (train.micro_batch_size * data_parallel)
        found.append(f"parallel.virtual_pipeline={parallel.virtual_pipeline} needs the {micro_batches} micro-batches of a rank to be a "
                     f"multiple of parallel.pipeline={parallel.pipeline}: change train.global_batch_size")  # fmt: skip
    if parallel.sequence and config.data.sequence_length % parallel.tensor:
        found.append(f"data.sequence_length={config.data.sequence_length} is not divisible by parallel.tensor={parallel.tensor}, "
                     "as parallel.sequence=true needs: change one of them")  # fmt: skip
    return found


def model_problems(config: PretrainConfig, model: ModelConfig) -> list[str]:
    parallel, found = config.parallel, []
    if min(parallel.tensor, parallel.pipeline) < 1:
        return found
    mlp = ("moe_ffn_hidden_size", "moe_shared_expert_ffn_hidden_size") if model.num_experts else ("ffn_hidden_size",)
    for name in ("num_attention_heads", *mlp, "vocab_size"):
        if getattr(model, name) % parallel.tensor:
            found.append(f"model.{name}={getattr(model, name)} is not divisible by parallel.tensor={parallel.tensor}: change one of them")
    if model.num_query_groups % parallel.tensor and parallel.tensor % model.num_query_groups:
        found.append(f"model.num_query_groups={model.num_query_groups} and parallel.tensor={parallel.tensor}: one must divide the other")
    elif (outputs := projection_shapes(model)["attention.qkv"][0]) % parallel.tensor:
        found.append(f"{outputs} outputs of attention.qkv (model.num_attention_heads={model.num_attention_heads}, model.num_query_groups="
                     f"{model.num_query_groups}) are not divisible by parallel.tensor={parallel.tensor}: change one of them")  # fmt: skip
    if model.num_layers % parallel.pipeline:
        found.append(f"model.num_layers={model.num_layers} is not divisible by parallel.pipeline={parallel.pipeline}: change one of them")
    elif parallel.pipeline > 1 and model.num_layers % (parallel.pipeline * max(1, parallel.virtual_pipeline)):
        chunks = parallel.pipeline * parallel.virtual_pipeline
        found.append(f"model.num_layers={model.num_layers} is not divisible by parallel.pipeline={parallel.pipeline} * "
                     f"parallel.virtual_pipeline={parallel.virtual_pipeline} = {chunks} chunks: change one of them")  # fmt: skip
    if model.tied_embeddings and parallel.pipeline > 1 and config.zero.stage == 2:
        found.append(f"zero.stage=2 cannot tie embeddings over parallel.pipeline={parallel.pipeline} stages "
                     "(model.tied_embeddings=true): it has scattered the gradients of the two copies before they can be added; "
                     "use zero.stage=1")  # fmt: skip
    return found


def projection_problems(config: PretrainConfig, model: ModelConfig) -> list[str]:
    """What keeps the linears' inputs from being sparse, or from being quantized, as the settings say."""
    widths, tensor = projection_widths(model), config.parallel.tensor
    found = sparsity_problems(config.qsparse, config.bitnet, widths, model.num_layers, tensor) if tensor > 0 else []
    if found or max(widths.values()) <= MAX_INPUTS and not config.train.check_codes:
        return found
    # Projections by layers: only where it matters.
    layers = range(model.num_layers)
    quantized = {
        projection: any(resolve(i, len(layers), projection, width, config.qsparse, config.bitnet).quantized for i in layers)
        for projection, width in widths.items()
    }
    if config.train.check_codes and not any(quantized.values()):
        found.append("train.check_codes=true has no effect without quantized projections: set bitnet.enabled=true, or leave it out")
    for projection, width in widths.items():
        if quantized[projection] and width > MAX_INPUTS:
            found.append(f"bitnet.enabled=true: {projection} has {width} input features, but sums of codes are exact up to "
                         f"{MAX_INPUTS} only: lower the width, or exempt it in qsparse.recipe (bitnet: false)")  # fmt: skip
    return found


def expert_problems(config: PretrainConfig, model: ModelConfig, world_size: int) -> list[str]:
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
    if min(parallel.tensor, parallel.pipeline, parallel.expert, world_size) < 1:
        return found
    if experts % parallel.expert:
        found.append(f"model.num_experts={experts} is not divisible by parallel.expert={parallel.expert}: change one of them")
    model_ranks = parallel.tensor * parallel.pipeline
    data_parallel = world_size // model_ranks
    if world_size % model_ranks == 0 and data_parallel % parallel.expert:
        found.append(f"parallel.expert={parallel.expert} does not divide the {data_parallel} data-parallel ranks of {world_size} processes "
                     f"with parallel.tensor={parallel.tensor} and parallel.pipeline={parallel.pipeline}: change one of them")  # fmt: skip
    return found
