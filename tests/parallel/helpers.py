"""What the tests of parallel layouts share: small models, layouts, and whole tensors put together from the ranks' shards.

Sharding is written down here a second time, independently of the library: a parameter is cut along `partition_dim`; gate_up
(stride 2) cuts its gate rows and its up rows separately. Experts are whole parameters, each with its number in its name.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_qsparse.config import BitNetConfig, ParallelConfig, QSparseConfig
from megatron_qsparse.models.config import ModelConfig
from megatron_qsparse.models.presets import apply_preset
from tests.distributed import AT_THE_END

SEQUENCE = 16
CPU = torch.device("cpu")


def small_model(**changes) -> ModelConfig:
    """Two layers, 64 wide. The standard deviation is large, so that every layer matters to the loss."""
    shape = {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 128, "init_std": 0.1,
    }  # fmt: skip
    return apply_preset(ModelConfig(**{**shape, **changes}), None)


EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 64, "ffn_hidden_size": None}
KEEP = {"keep": 0.4, "groups": 8, "block_m": 16}
VARIANTS: dict[str, tuple[ModelConfig, QSparseConfig, BitNetConfig]] = {
    "dense": (small_model(), QSparseConfig(), BitNetConfig()),
    "groups": (small_model(), QSparseConfig(**KEEP), BitNetConfig()),
    "block": (small_model(), QSparseConfig(**KEEP, mode="block"), BitNetConfig()),
    "global": (small_model(), QSparseConfig(**KEEP, mode="global"), BitNetConfig()),
    "rescale": (small_model(), QSparseConfig(**KEEP, rescale="l2"), BitNetConfig()),
    "subln": (small_model(), QSparseConfig(), BitNetConfig(subln=True)),
    "bitnet": (small_model(), QSparseConfig(), BitNetConfig(enabled=True)),
    "bitnet_block": (small_model(), QSparseConfig(**KEEP, mode="block"), BitNetConfig(enabled=True)),
    "bitnet_groups_subln": (small_model(), QSparseConfig(**KEEP), BitNetConfig(enabled=True, subln=True)),
    "bitnet_global_rescale": (small_model(), QSparseConfig(**KEEP, mode="global", rescale="l2"), BitNetConfig(enabled=True)),
    "tied": (small_model(tied_embeddings=True), QSparseConfig(**KEEP), BitNetConfig()),
    "tied_bitnet_subln": (small_model(tied_embeddings=True), QSparseConfig(**KEEP), BitNetConfig(enabled=True, subln=True)),
    "one_kv_head": (small_model(num_query_groups=1), QSparseConfig(**KEEP), BitNetConfig(enabled=True)),
    "moe": (small_model(**EXPERTS), QSparseConfig(), BitNetConfig()),
    "moe_bitnet_groups": (small_model(**EXPERTS), QSparseConfig(**KEEP), BitNetConfig(enabled=True)),
    "moe_bitnet_groups_subln": (
        small_model(**EXPERTS, moe_shared_expert_ffn_hidden_size=64), QSparseConfig(**KEEP), BitNetConfig(enabled=True, subln=True)
    ),
    "moe_tied": (small_model(**EXPERTS, tied_embeddings=True), QSparseConfig(**KEEP), BitNetConfig(enabled=True)),
    "two_kv_heads": (small_model(num_query_groups=2), QSparseConfig(**KEEP), BitNetConfig(enabled=True)),
}  # fmt: skip


ENGINES: list = []
"""Made in the present layout. DeepSpeed's gradient hooks make cycles that Python cannot see: unless an engine is destroyed, it
lives on, and with it all process groups of its model, each with its sockets and threads."""


@contextlib.contextmanager
def layout(
    tensor: int = 1, pipeline: int = 1, sequence: bool = False, virtual: int = 1, expert: int = 1, dispatcher: str = "alltoall"
) -> Iterator[ParallelConfig]:
    """Megatron's groups for one layout over the running default group; other layouts may follow."""
    from megatron.core import parallel_state

    parallel = ParallelConfig(
        tensor=tensor, pipeline=pipeline, sequence=sequence, virtual_pipeline=virtual, expert=expert, moe_token_dispatcher=dispatcher
    )
    _initialize(parallel)
    try:
        yield parallel
    finally:
        while ENGINES:
            ENGINES.pop().engine.destroy()
        parallel_state.destroy_model_parallel()


_initialized: dict[tuple[int, int, int, int], dict] = {}
"""The groups of the layouts of this world."""
AT_THE_END.append(_initialized.clear)


def _initialize(parallel: ParallelConfig) -> None:
    """Make the groups of a layout, or take those that it had before in this world.

    Megatron only forgets its groups (`destroy_model_parallel`), so that each new layout would add about 50 gloo threads until
    the world ends, which wake up a hundred times a second.
    """
    from megatron.core import parallel_state, tensor_parallel

    from megatron_qsparse.parallel import groups

    key = parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.expert
    state = _initialized.get(key)
    if state is None:
        groups.initialize(parallel, CPU, seed=0)
        _initialized[key] = {name: value for name, value in vars(parallel_state).items() if name.isupper()}
    else:
        vars(parallel_state).update(state)
        tensor_parallel.model_parallel_cuda_manual_seed(0)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """This process alone as a world of one rank, with Megatron's groups; everything is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        try:
            with layout():
                yield
        finally:
            _initialized.clear()
            dist.destroy_process_group()


def build(
    variant: str, parallel: ParallelConfig, dtype: torch.dtype = torch.float32, seed: int = 0, recompute: bool = False, layers: int = 2
):
    """This rank's part of a variant, with the library's own initial weights."""
    from megatron_qsparse.models.gpt import build_model

    model, qsparse, bitnet = VARIANTS[variant]
    model = replace(model, num_layers=layers)
    return build_model(
        model, qsparse, bitnet, parallel, sequence_length=SEQUENCE, dtype=dtype, seed=seed, device=CPU, recompute=recompute
    )  # fmt: skip


def tokens(samples: int, seed: int = 0, vocabulary: int = 128) -> torch.Tensor:
    """int64 [samples, SEQUENCE + 1]"""
    return torch.randint(vocabulary, (samples, SEQUENCE + 1), generator=torch.Generator().manual_seed(seed))


def global_names(model) -> dict[str, torch.nn.Parameter]:
    """Parameters by the name they have in a model that is not cut into pipeline stages and holds all experts."""
    from megatron.core import parallel_state

    local = (model.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * local
    experts = {f".local_experts.{i}.": f".local_experts.{first + i}." for i in range(local)}
    named = {}
    # Several GPTModels where the schedule is interleaved.
    for chunk in getattr(model, "chunks", [model]):
        layers = {f"decoder.layers.{i}.": f"decoder.layers.{layer.layer_number - 1}." for i, layer in enumerate(chunk.decoder.layers)}
        for name, param in chunk.named_parameters():
            for numbers in (layers, experts):
                here = next((part for part in numbers if part in name), None)
                name = name if here is None else name.replace(here, numbers[here])
            named[name] = param
    return named


def join(shards: list[torch.Tensor], param: torch.nn.Parameter) -> torch.Tensor:
    """The whole tensor from the tensor-parallel ranks' shards of `param`."""
    if not getattr(param, "tensor_model_parallel", False):
        return shards[0]
    dim, stride = param.partition_dim, param.partition_stride
    pieces = [shard.chunk(stride, dim=dim) for shard in shards]
    return torch.cat([piece[i] for i in range(stride) for piece in pieces], dim=dim)


def cut(whole: torch.Tensor, param: torch.nn.Parameter, rank: int, ranks: int) -> torch.Tensor:
    """The inverse of `join`."""
    if not getattr(param, "tensor_model_parallel", False):
        return whole
    dim = param.partition_dim
    return torch.cat([half.chunk(ranks, dim=dim)[rank] for half in whole.chunk(param.partition_stride, dim=dim)], dim=dim)


def reports(mine, everywhere: bool = True) -> list:
    """`mine` of every rank, in their order; with `everywhere` False on rank 0 only, and nothing elsewhere.

    Packed by torch.save: pickling tensors one by one costs half a millisecond each.
    """
    buffer, packed = io.BytesIO(), [None] * dist.get_world_size()
    torch.save(mine, buffer)
    if everywhere:
        dist.all_gather_object(packed, buffer.getvalue())
    elif dist.get_rank() == 0:
        dist.gather_object(buffer.getvalue(), packed)
    else:
        dist.gather_object(buffer.getvalue())
        return []
    return [torch.load(io.BytesIO(report), weights_only=False) for report in packed]


def gather(
    model, pick=lambda param: param.detach(), differing: list[str] | None = None, everywhere: bool = True
) -> dict[str, torch.Tensor]:
    """`pick(param)` of every parameter of the whole model, by global name; where, see `reports`. ZeRO-3's are whole for `pick`.

    Replicas must be equal bit for bit; with `differing` the names of those that are not are appended to it instead.
    """
    from megatron.core import parallel_state

    from megatron_qsparse.parallel.partition import gathered

    picked = {}
    for name, param in global_names(model).items():
        with gathered([param]):
            picked[name] = pick(param).clone()
    here = (parallel_state.get_tensor_model_parallel_rank(), picked)
    kinds = {
        name: (getattr(p, "tensor_model_parallel", False), getattr(p, "partition_dim", 0), getattr(p, "partition_stride", 1))
        for name, p in global_names(model).items()
    }
    everyone = reports((*here, kinds), everywhere)
    whole: dict[str, torch.Tensor] = {}
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    for name in {name for _, named, _ in everyone for name in named}:
        shards: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
        for rank, named, all_kinds in everyone:
            if name in named:
                shards[rank].append(named[name])
                split, dim, stride = all_kinds[name]
        replicas = shards if split else [[copy for copies in shards for copy in copies]]
        if not all(torch.equal(copies[0], copy) for copies in replicas for copy in copies):
            assert differing is not None, f"{name}: replicas differ"
            differing.append(name)
        like = torch.empty(0)
        like.tensor_model_parallel, like.partition_dim, like.partition_stride = split, dim, stride
        whole[name] = join([copies[0] for copies in shards], like)
    return whole


@torch.no_grad()
def load(model, whole: dict[str, torch.Tensor]) -> None:
    """Give every parameter its share of the whole weights (fp32: ZeRO's master weights as well at stage 3 only)."""
    from megatron.core import parallel_state

    from megatron_qsparse.parallel.partition import write

    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    for name, param in global_names(model).items():
        write(param, cut(whole[name], param, rank, ranks))
