"""Mode "global" on real gloo processes: the mask equals a stable sort of the gathered token."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_qsparse.layers import global_topk
from megatron_qsparse.layers.global_topk import global_topk_mask

TOKENS, WIDTH = 12, 96


def _stable_sort_mask(x, k):
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, True)


def _rows(dtype):
    """Whole tokens [TOKENS, WIDTH] with every kind of trouble; the ties lie on all shards."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    x[0] = 0
    x[1].relu_()
    x[2] = (x[2] * 2).round() / 2
    x[3] = 1
    x[4, ::2] = -0.0
    x[5, :40] = float("inf")
    x[6, 50] = float("nan")
    x[7] *= 1e-6
    x[8, WIDTH // 2 :] = x[8, : WIDTH // 2].neg()
    x[9] = torch.where(torch.arange(WIDTH) % 7 == 0, -3.0, 0.5)
    return x.to(dtype)


def _masks(rank, cases):
    """This rank's masks for (dtype, k, shape of the leading dimensions) in one go."""
    size = dist.get_world_size()
    results = []
    for dtype, k, leading in cases:
        shard = _rows(dtype).chunk(size, dim=-1)[rank]
        assert not shard.is_contiguous()
        results.append(global_topk_mask(shard.unflatten(0, leading), k, dist.group.WORLD))
    return results


def _small_chunks(rank, k):
    with mock.patch.object(global_topk, "_CHUNK_ENTRIES", 50):
        return global_topk_mask(_rows(torch.bfloat16).chunk(dist.get_world_size(), dim=-1)[rank], k, dist.group.WORLD)


def _edge_cases(rank):
    group = dist.group.WORLD
    alone = dist.new_group([0])
    row = _rows(torch.float32)[2]
    result = {
        "one row": global_topk_mask(row.chunk(group.size())[rank], 5, group),
        "empty": global_topk_mask(torch.empty(0, 8), 5, group).shape,
        "gradient": global_topk_mask(_rows(torch.float32).requires_grad_().chunk(group.size(), -1)[rank], 5, group).requires_grad,
    }
    if rank == 0:
        result["alone"] = global_topk_mask(_rows(torch.float32), 5, alone)
    for k in (0, 8 * group.size() + 1):
        with pytest.raises(ValueError, match=f"cannot keep {k} of {8 * group.size()}"):
            global_topk_mask(torch.ones(2, 8), k, group)
    return result


@pytest.mark.parametrize("size", [2, 4])
def test_mask_equals_the_stable_sort_of_the_gathered_token(pool, size):
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    cases = [(dtype, k, (3, 4) if k == 38 else (TOKENS,)) for dtype in dtypes for k in (1, 13, 38, 95, 96)]
    by_rank = pool.run(_masks, size, cases)
    for case, (dtype, k, leading) in enumerate(cases):
        mask = torch.cat([masks[case] for masks in by_rank], dim=-1)
        assert mask.shape == (*leading, WIDTH)
        assert torch.equal(mask.flatten(0, -2), _stable_sort_mask(_rows(dtype), k)), (dtype, k)


def test_the_mask_does_not_depend_on_the_chunks(pool):
    mask = torch.cat(pool.run(_small_chunks, 2, 38), dim=-1)
    assert torch.equal(mask, _stable_sort_mask(_rows(torch.bfloat16), 38))


def test_shapes_sizes_and_refusals(pool):
    results = pool.run(_edge_cases, 2)
    assert torch.equal(torch.cat([r["one row"] for r in results]), _stable_sort_mask(_rows(torch.float32), 5)[2])
    assert all(r["empty"] == (0, 8) and not r["gradient"] for r in results)
    assert torch.equal(results[0]["alone"], _stable_sort_mask(_rows(torch.float32), 5))
