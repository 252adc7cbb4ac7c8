"""The two linears: dense they are Megatron's own bit for bit, and Column linears do not change a bit with tensor parallelism."""

import pytest
import torch
import torch.distributed as dist

from megatron_qsparse.config import ProjectionSettings
from tests.parallel.helpers import SEQUENCE, build, cut, global_names, join, layout, load
from tests.parallel.teacher import whole_weights

LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2-sp": (2, True), "tp4": (4, False), "tp4-sp": (4, True)}
COLUMNS = {"qkv": "self_attention.linear_qkv", "gate_up": "mlp.linear_fc1"}
ROWS = {"proj": "self_attention.linear_proj", "down": "mlp.linear_fc2"}
VARIANTS = ("bitnet_groups_subln", "one_kv_head")


def _input(*shape, seed: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _forward_backward(linear, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y, _ = linear(x)
    y.backward(_input(*y.shape, seed=5, dtype=y.dtype))
    return [y.detach(), x.grad, linear.weight.grad]


def _dense_pairs(parallel, dtype) -> dict[str, list[bool]]:
    """For Column and Row: whether output, input gradient and weight gradient equal those of Megatron's class."""
    from megatron.core import tensor_parallel

    from megatron_qsparse.layers.linear import SparseColumnParallelLinear, SparseRowParallelLinear
    from megatron_qsparse.models.gpt import transformer_config
    from tests.parallel.helpers import small_model

    config, found = transformer_config(small_model(), parallel, dtype), {}
    kinds = {
        "column": (SparseColumnParallelLinear, tensor_parallel.ColumnParallelLinear, {"gather_output": False}),
        "row": (SparseRowParallelLinear, tensor_parallel.RowParallelLinear, {"input_is_parallel": True}),
    }
    for name, (ours, megatrons, options) in kinds.items():
        options = {"config": config, "init_method": torch.nn.init.normal_, "bias": False, "skip_bias_add": False, **options}
        dense = ProjectionSettings(name="layers.0.mlp.down", projection="mlp.down")
        pair = [ours(64, 96, settings=dense, **options), megatrons(64, 96, **options)]
        with torch.no_grad():
            pair[0].weight.copy_(pair[1].weight)
        sequence = SEQUENCE // parallel.tensor if parallel.sequence and name == "column" else SEQUENCE
        x = _input(sequence, 2, 64 // (parallel.tensor if name == "row" else 1), seed=dist.get_rank(), dtype=dtype)
        results = [_forward_backward(linear, x) for linear in pair]
        found[name] = [torch.equal(a, b) and bool(a.any()) for a, b in zip(*results, strict=True)]
    return found


def _column_results(variant: str, parallel, weights, dtype) -> dict[str, tuple[torch.Tensor, ...]]:
    """Per Column linear of a quantized model: whole output, alphas and weight gradient, from one whole input."""
    from megatron.core import parallel_state

    from megatron_qsparse.layers.ternary import TernaryWeights

    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    model, found = build(variant, parallel, dtype), {}
    load(model, weights)
    TernaryWeights(model.modules())
    for name, path in COLUMNS.items():
        linear = model.decoder.layers[0].get_submodule(path)
        x = _input(SEQUENCE, 2, 64, seed=1, dtype=dtype)
        x = (x.chunk(ranks)[rank] if parallel.sequence else x).clone().requires_grad_()
        y, _ = linear(x)
        whole = _input(linear.output_size, SEQUENCE, 2, seed=2, dtype=dtype)
        y.backward(cut(whole, linear.weight, rank, ranks).movedim(0, -1).contiguous())
        shards = [None] * ranks
        mine = (y.detach().movedim(-1, 0).clone(), linear.ternary.alpha.clone(), linear.weight.grad)
        dist.all_gather_object(shards, mine, group=parallel_state.get_tensor_model_parallel_group())
        found[name] = tuple(join(list(parts), linear.weight) for parts in zip(*shards, strict=True))
    return found


def _row_results(parallel, weights, dtype) -> dict[str, tuple[torch.Tensor, ...]]:
    """Per Row linear of a quantized model without SubLN: whole output, alphas and weight gradient, from one whole input."""
    from megatron.core import parallel_state

    from megatron_qsparse.layers.ternary import TernaryWeights

    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    model, found = build("one_kv_head", parallel, dtype), {}
    load(model, weights)
    TernaryWeights(model.modules())
    for name, path in ROWS.items():
        linear = model.decoder.layers[0].get_submodule(path)
        x = _input(SEQUENCE, 2, linear.input_size, seed=3, dtype=dtype).chunk(ranks, dim=-1)[rank].clone().requires_grad_()
        y, _ = linear(x)
        whole = _input(SEQUENCE, 2, 64, seed=4, dtype=dtype)
        y.backward(whole.chunk(ranks)[rank] if parallel.sequence else whole)
        shards = [None] * ranks
        mine = (y.detach(), linear.ternary.alpha.clone(), linear.weight.grad)
        dist.all_gather_object(shards, mine, group=parallel_state.get_tensor_model_parallel_group())
        outputs, alphas, gradients = zip(*shards, strict=True)
        found[name] = (torch.cat(outputs) if parallel.sequence else outputs[0], alphas[0], join(list(gradients), linear.weight))
    return found


def _everything(rank: int) -> dict:
    found = {}
    with layout():
        weights = {variant: whole_weights(variant) for variant in VARIANTS}
    for name, (tensor, sequence) in LAYOUTS.items():
        with layout(tensor, sequence=sequence) as parallel:
            for dtype in (torch.float32, torch.bfloat16):
                found["dense", name, dtype] = _dense_pairs(parallel, dtype)
                for variant in VARIANTS:
                    found[variant, name, dtype] = _column_results(variant, parallel, weights[variant], dtype)
                found["rows", name, dtype] = _row_results(parallel, weights["one_kv_head"], dtype)
    return found


@pytest.fixture(scope="module")
def results(pool) -> list[dict]:
    return pool.run(_everything, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_without_sparsity_and_bitnet_they_are_megatrons_own_bit_for_bit(results, name, dtype):
    for rank in results:
        assert rank["dense", name, dtype] == {"column": [True] * 3, "row": [True] * 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tp2", "tp2-sp", "tp4", "tp4-sp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_alphas_and_weight_gradients_of_column_linears_keep_every_bit(results, variant, name, dtype):
    one, many = results[0][variant, "tp1", dtype], results[0][variant, name, dtype]
    for projection in COLUMNS:
        for what, expected, found in zip(("output", "alpha", "weight gradient"), one[projection], many[projection], strict=True):
            assert expected.any() and torch.equal(found, expected), (projection, what)
        # The matrices differ in scale, so a row with a neighbour's alpha would show.
        assert len(one[projection][1].unique()) == {"qkv": 3, "gate_up": 2}[projection]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tp2", "tp2-sp", "tp4", "tp4-sp"])
def test_alphas_and_weight_gradients_of_row_linears_keep_every_bit(results, name, dtype):
    """Their outputs are sums over ranks, equal to rounding."""
    one, many = results[0]["rows", "tp1", dtype], results[0]["rows", name, dtype]
    for projection in ROWS:
        for what, expected, found in zip(("alpha", "weight gradient"), one[projection][1:], many[projection][1:], strict=True):
            assert expected.any() and torch.equal(found, expected), (projection, what)
        expected, found = one[projection][0], many[projection][0]
        assert (found - expected).abs().max() <= expected.abs().max() * (2e-7 if dtype == torch.float32 else 1e-2)


def test_a_quantized_linear_refuses_what_it_would_ignore(alone):
    from megatron_qsparse.config import ParallelConfig
    from megatron_qsparse.layers.linear import SparseColumnParallelLinear
    from megatron_qsparse.models.gpt import transformer_config
    from tests.parallel.helpers import small_model

    config = transformer_config(small_model(), ParallelConfig(), torch.float32)
    quantized = ProjectionSettings(name="layers.0.mlp.gate_up", projection="mlp.gate_up", quantized=True)
    options = {"init_method": torch.nn.init.normal_, "skip_bias_add": False, "gather_output": False}
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_up: .*add_bias_linear=False"):
        SparseColumnParallelLinear(64, 96, config=config, bias=True, settings=quantized, **options)


def _misfit(rank: int) -> str:
    from megatron_qsparse.config import BitNetConfig, QSparseConfig
    from megatron_qsparse.models.gpt import build_model
    from tests.parallel.helpers import CPU, small_model

    with layout(4) as parallel, pytest.raises(ValueError) as caught:
        build_model(
            small_model(), QSparseConfig(keep=0.5, groups=2), BitNetConfig(), parallel,
            sequence_length=SEQUENCE, dtype=torch.float32, seed=0, device=CPU,
        )  # fmt: skip
    return str(caught.value)


def test_groups_that_ranks_cannot_share_are_refused_and_not_made_smaller(pool):
    words = "layers.0.attention.proj: its 2 slices cannot be divided among 4 tensor-parallel ranks"
    assert all(message.startswith(words) for message in pool.run(_misfit, 4))


def test_loading_by_name_reaches_every_parameter(alone):
    """Guards the comparisons above: what the reference loads is what the model holds."""
    from megatron_qsparse.config import ParallelConfig

    model, weights = build("bitnet_groups_subln", ParallelConfig()), whole_weights("bitnet_groups_subln")
    load(model, weights)
    assert global_names(model).keys() == weights.keys()
    assert all(torch.equal(param, weights[name]) for name, param in global_names(model).items())
