"""Fewer key/value heads than tensor-parallel ranks: Megatron then cuts qkv across heads, so that one rank's rows may belong to
several logical matrices, and puts the heads together after the product. Their steps are compared in test_invariance.py.
"""

import pytest
import torch
import torch.distributed as dist

from tests.parallel.helpers import build, layout

KV_HEADS = {"one_kv_head": 1, "two_kv_heads": 2}
HEADS, HEAD_DIM = 4, 16


def _places(rank: int) -> dict:
    found = {"stored": {}, "labels": {}}
    for variant in KV_HEADS:
        with layout() as parallel:
            whole = build(variant, parallel).decoder.layers[1].self_attention.linear_qkv.weight.detach().clone()
        with layout(tensor=4) as parallel:
            found["stored"][variant] = torch.equal(_stored_qkv(build(variant, parallel)), whole)
            found["labels"][variant] = _labels(build(variant, parallel))
    return found


def _stored_qkv(model) -> torch.Tensor:
    """The second layer's whole qkv weight, put together by the places that its checkpoint shards name."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(metadata={"dp_cp_group": group})
    shard = state["decoder.layers.1.self_attention.linear_qkv.weight"]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (shard.global_offset[-2:], shard.data))
    whole = torch.full(shard.global_shape[-2:], torch.nan)
    for (row, column), data in parts:
        whole[row : row + data.shape[0], column : column + data.shape[1]] = data
    return whole


def _labels(model) -> list[int]:
    """0, 1, 2 for q, k, v of every row, rank after rank."""
    from megatron_qsparse.layers.ternary import logical_rows

    labels, _ = logical_rows(model.decoder.layers[1].self_attention.linear_qkv, "attention.qkv")
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, labels.tolist())
    return sum(parts, [])


@pytest.fixture(scope="module")
def four_ranks(pool) -> dict:
    return pool.run(_places, 4)[0]


@pytest.mark.parametrize(("variant", "kv_heads"), KV_HEADS.items())
def test_a_checkpoint_stores_every_row_at_its_global_place(four_ranks, variant, kv_heads):
    assert four_ranks["stored"][variant]
    group = [0] * (HEADS // kv_heads * HEAD_DIM) + [1] * HEAD_DIM + [2] * HEAD_DIM
    assert four_ranks["labels"][variant] == group * kv_heads
