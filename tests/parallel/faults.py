"""Mistakes that a careless implementation would make, for the suite to prove that it finds them."""

import types
from collections.abc import Callable

import pytest

from tests.parallel.comparison import Comparison
from tests.parallel.teacher import against_reference


def against_reference_with(rank: int, mistake: str | None, *args) -> list[list[Comparison]]:
    """`against_reference(rank, *args)` by a library that makes the mistake, if any."""
    with pytest.MonkeyPatch.context() as patch:
        if mistake is not None:
            MISTAKES[mistake](patch)
        return against_reference(rank, *args)


def _unreduced(partial, group):
    return partial


def _all_groups_in_each_shard(patch) -> None:
    from megatron_qsparse.layers import linear
    from megatron_qsparse.ops.topk import topk_mask

    patch.setattr(linear._SparseLinear, "mask", lambda self, x: topk_mask(x, self.settings.k(x.shape[-1]), self.settings.groups))


def _top_k_of_each_shard(patch) -> None:
    from megatron_qsparse.layers import linear
    from megatron_qsparse.ops.topk import topk_mask

    patch.setattr(linear, "global_topk_mask", lambda x, k, group: topk_mask(x, k // group.size()))


def _absmean_of_each_shard(patch) -> None:
    from megatron_qsparse.layers import ternary

    rows = ternary.logical_rows
    patch.setattr(ternary, "dist", types.SimpleNamespace(all_reduce=lambda tensor, group: None, ProcessGroup=object))
    patch.setattr(ternary, "logical_rows", lambda *args: (rows(*args)[0], [entries // 2 for entries in rows(*args)[1]]))


def _absmax_of_each_shard(patch) -> None:
    from megatron_qsparse.layers import linear

    patch.setattr(linear, "reduce_max", _unreduced)


def _subln_of_each_shard(patch) -> None:
    from megatron_qsparse.layers import norm

    init = norm.SubLayerNorm.__init__
    patch.setattr(norm, "reduce_sum", _unreduced)
    patch.setattr(norm.SubLayerNorm, "__init__", lambda self, width, local, *rest: init(self, local, local, *rest))


def _subln_without_its_backward_reduction(patch) -> None:
    from megatron_qsparse.layers import collectives

    patch.setattr(collectives._ReduceSum, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def _rescale_of_each_shard(patch) -> None:
    from megatron_qsparse.layers import linear

    patch.setattr(linear, "reduce_sum", _unreduced)


def _rows_by_local_index(patch) -> None:
    from megatron_qsparse.layers import ternary

    rows = ternary.logical_rows

    class RankZero:
        def __init__(self, layer):
            self.layer, self.tp_group = layer, types.SimpleNamespace(rank=lambda: 0)

        def __getattr__(self, name):
            return getattr(self.layer, name)

    patch.setattr(ternary, "logical_rows", lambda layer, projection: rows(RankZero(layer), projection))


def _no_sequence_parallel_hook(patch) -> None:
    from megatron_qsparse.parallel import zero

    patch.setattr(zero, "install_sequence_parallel_hooks", lambda model: None)


def _stale_alpha(patch) -> None:
    from megatron_qsparse.parallel.zero import ZeroEngine

    patch.setattr(ZeroEngine, "weights_changed", lambda self: None)


def _no_sum_of_a_tied_embedding(patch) -> None:
    from megatron_qsparse.parallel import zero

    patch.setattr(zero, "reduce_shared_embedding", lambda weight, optimizer: None)


def _adam_step_reset(patch) -> None:
    from megatron_qsparse.parallel.checkpoint import loading

    create = loading.create_adam_state
    patch.setattr(loading, "create_adam_state", lambda engine, step: create(engine, 0))


def _no_reset_before_each_backward(patch) -> None:
    """Should this no longer be found after an update of DeepSpeed, `ScheduledModel` no longer needs its hook."""
    from megatron_qsparse.parallel.schedule import ScheduledModel

    patch.setattr(ScheduledModel, "_before_backward", lambda self, grad: None)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "all groups in each shard": _all_groups_in_each_shard,
    "top-K of each shard": _top_k_of_each_shard,
    "absmean of each shard": _absmean_of_each_shard,
    "absmax of each shard": _absmax_of_each_shard,
    "SubLN of each shard": _subln_of_each_shard,
    "SubLN without its backward reduction": _subln_without_its_backward_reduction,
    "rescale of each shard": _rescale_of_each_shard,
    "query, key and value rows by local index": _rows_by_local_index,
    "no sequence-parallel hook": _no_sequence_parallel_hook,
    "stale alpha": _stale_alpha,
    "no sum of a tied embedding": _no_sum_of_a_tied_embedding,
    "Adam's step count reset": _adam_step_reset,
    "no reset before each backward": _no_reset_before_each_backward,
}
