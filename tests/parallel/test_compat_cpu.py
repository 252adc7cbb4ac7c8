"""Each entry of `compat.cpu.PATCHES` is still needed, and none of them reaches beyond the module it names."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from packaging.version import Version

from megatron_qsparse.compat import cpu
from tests.parallel.helpers import VARIANTS, layout, small_model
from tests.parallel.training import Case, make_engine, micro_batches

pytestmark = pytest.mark.skipif(not cpu.needed(), reason="with a CUDA device nothing is patched")


def _rotary(parallel, root: Path) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    RotaryEmbedding(kv_channels=16, rotary_percent=1.0, use_cpu_initialization=True)(8)


def _sequence_parallel_linear(parallel, root: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

    x, weight = torch.ones(4, 1, 8, requires_grad=True), torch.ones(8, 8, requires_grad=True)
    group = parallel_state.get_tensor_model_parallel_group()
    linear_with_grad_accumulation_and_async_allreduce(x, weight, None, False, False, True, tp_group=group).sum().backward()


def _scatter_to_sequence(parallel, root: Path) -> None:
    from megatron.core.tensor_parallel import mappings

    mappings.gather_from_sequence_parallel_region(torch.ones(4, 8))


def _random_states(parallel, root: Path) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(1)


def _memory_buffer(parallel, root: Path) -> None:
    from megatron.core.utils import GlobalMemoryBuffer

    GlobalMemoryBuffer().get_tensor([4], torch.float32, "test")


def _schedule(parallel, root: Path) -> None:
    engine = make_engine(Case(), parallel)
    engine._run(iter(micro_batches(0)), 2, train=True)


def _receive(parallel, root: Path) -> None:
    """The last stage receives one activation; without its patch it fails before the first stage is asked for anything."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_qsparse.models.gpt import transformer_config

    config = transformer_config(small_model(), parallel, torch.float32)
    pipeline = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
    if parallel_state.is_pipeline_last_stage():
        assert pipeline.recv_forward((4, 1, 8), is_first_stage=False).shape == (4, 1, 8)
    elif _patched("megatron.core.pipeline_parallel.p2p_communication"):
        pipeline.send_forward(torch.ones(4, 1, 8), is_last_stage=False)


def _save(parallel, root: Path) -> None:
    from megatron.core import dist_checkpointing

    directory = root / f"saved{len(list(root.iterdir()))}"
    dist.barrier()
    if dist.get_rank() == 0:
        directory.mkdir()
    dist.barrier()
    tensor = dist_checkpointing.ShardedTensor.from_rank_offsets("weight", torch.ones(2), (0, dist.get_rank(), dist.get_world_size()))
    dist_checkpointing.save({"weight": tensor}, str(directory))


def _router(parallel, root: Path) -> None:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    TopKRouter(_expert_config(parallel), get_default_pg_collection())(torch.ones(4, 1, 64))


def _dispatcher(parallel, root: Path) -> None:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = None
    dispatcher = MoEAlltoAllTokenDispatcher(
        2, [2 * dist.get_rank(), 2 * dist.get_rank() + 1], _expert_config(parallel), get_default_pg_collection()
    )
    routes = torch.tensor([[True, False, True, False]] * 4)
    sent, probabilities = dispatcher.dispatch_preprocess(torch.ones(4, 1, 64), routes, routes / 2)
    received, _ = dispatcher.token_dispatch(sent, probabilities)
    # Both ranks send each of their 4 tokens to one expert of every rank.
    assert received.shape == (8, 64)


def _expert_config(parallel):
    from megatron_qsparse.models.gpt import transformer_config

    return transformer_config(VARIANTS["moe"][0], parallel, torch.float32)


SNIPPETS: dict[str, tuple[Callable, dict]] = {
    "megatron.core.models.common.embeddings.rotary_pos_embedding": (_rotary, {}),
    "megatron.core.tensor_parallel.layers": (_sequence_parallel_linear, {"tensor": 2}),
    "megatron.core.tensor_parallel.mappings": (_scatter_to_sequence, {"tensor": 2}),
    "megatron.core.tensor_parallel.random": (_random_states, {}),
    "megatron.core.transformer.moe.router": (_router, {}),
    "megatron.core.transformer.moe.token_dispatcher": (_dispatcher, {"expert": 2}),
    "megatron.core.utils": (_memory_buffer, {}),
    "megatron.core.pipeline_parallel.schedules": (_schedule, {}),
    "megatron.core.pipeline_parallel.p2p_communication": (_receive, {"pipeline": 2}),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (_save, {}),
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": (_save, {}),
}


def _patched(name: str) -> bool:
    return importlib.import_module(name).torch is not torch


def _outcome(snippet: Callable, parallel, root: Path) -> str:
    try:
        snippet(parallel, root)
    except Exception as error:  # whatever the missing device raises
        return f"{type(error).__name__}: {error}"
    return "ok"


def _run_snippets(rank: int, root: Path) -> dict[str, tuple[str, str]]:
    """Per entry: what happens with it and without it."""
    found = {}
    for name, (snippet, sizes) in SNIPPETS.items():
        with layout(**sizes) as parallel:
            with_patch = _outcome(snippet, parallel, root)
            dist.barrier()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(importlib.import_module(name), "torch", torch)
                without_patch = _outcome(snippet, parallel, root)
            assert _patched(name)
            found[name] = with_patch, without_patch
            dist.barrier()
    return found


def _uneven_shards(rank: int) -> dict:
    """Three rows of rank 0 and one of rank 1, gathered, and their double reduced and scattered again, both with a gradient."""
    from megatron.core.tensor_parallel import mappings

    with layout(tensor=2):
        whole = torch.arange(8.0).view(4, 2)
        mine = whole.split([3, 1])[rank].clone().requires_grad_()
        gathered = mappings.gather_from_sequence_parallel_region(mine, output_split_sizes=[3, 1])
        scattered = mappings.reduce_scatter_to_sequence_parallel_region(gathered, input_split_sizes=[3, 1])
        scattered.sum().backward()
        with pytest.raises((RuntimeError, ValueError)) as refused:
            dist.all_gather([torch.empty(3, 2), torch.empty(1, 2)], mine.detach())
        equal = torch.equal(gathered, whole), torch.equal(scattered, 2 * mine), torch.equal(mine.grad, torch.full_like(mine, 2.0))
        return {"equal": equal, "refused": str(refused.value)}


def test_shards_of_different_lengths_are_gathered_and_scattered(pool):
    """Should the second part fail after an update of torch, `_DistributedView` can go."""
    for found in pool.run(_uneven_shards, 2):
        assert found["equal"] == (True, True, True)
        assert "size" in found["refused"]


def _without_host_splits(rank: int) -> str:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    with layout(expert=2) as parallel, pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", moe_utils.maybe_move_tensor_to_cpu)
        return _outcome(_dispatcher, parallel, Path())


def test_split_sizes_as_tensors_are_refused(pool):
    """Should this fail after an update of Megatron or torch, `_use_host_splits` can go."""
    assert all(outcome.startswith("TypeError") for outcome in pool.run(_without_host_splits, 2))


UNPATCHED = """
import importlib.metadata, json
import torch
from megatron.core import jit
from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils, router
import deepspeed

def works(call):
    try:
        call()
    except (AssertionError, RuntimeError):
        # torch's own two for a missing device: not compiled for it, or no driver. Anything else is news.
        return False
    return True

def written():
    before = torch.get_rng_state()
    torch.rand(1)
    return works(lambda: random._set_cuda_rng_state(before)) and torch.equal(torch.get_rng_state(), before)

print(json.dumps({
    "version": importlib.metadata.version("megatron-core"),
    "transformer engine": moe_utils.HAVE_TE,
    "te_general_gemm": hasattr(moe_utils, "te_general_gemm"),
    "compiled router": hasattr(router.TopKRouter._apply_expert_bias, "_torchdynamo_orig_callable"),
    "jit fuser": jit.jit_fuser is torch.compile or hasattr(jit.jit_fuser(lambda x: x), "_torchdynamo_orig_callable"),
    "generator read": works(random._get_cuda_rng_state),
    "generator written": written(),
    "shared-memory op": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"],
}))
"""


@pytest.fixture(scope="module")
def unpatched() -> dict:
    """What the libraries are by themselves, in a process that has nothing of ours."""
    environment = dict(os.environ, CUDA_VISIBLE_DEVICES="")
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", UNPATCHED], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_router_needs_a_name_that_only_transformer_engine_defines(unpatched):
    """0.19 defines it: once nothing older is supported, `compat.moe` can go."""
    newer = Version(unpatched["version"]) >= Version("0.19")
    assert unpatched["te_general_gemm"] is (newer or unpatched["transformer engine"])


@pytest.mark.parametrize(
    ("fact", "expected"),
    [("compiled router", True), ("jit fuser", True), ("generator read", False), ("generator written", False), ("shared-memory op", True)],
)
def test_the_libraries_still_need_what_is_changed_without_an_entry_in_patches(unpatched, fact, expected):
    """Should one fail after an update, `_use_eager_router`, `disable_jit_fuser`, `_use_cpu_generator` or the switched-off op of
    compat/deepspeed.py can go."""
    assert unpatched[fact] is expected


@pytest.fixture(scope="module")
def outcomes(pool, tmp_path_factory) -> list[dict[str, tuple[str, str]]]:
    return pool.run(_run_snippets, 2, tmp_path_factory.mktemp("saved"))


def test_every_patch_has_a_snippet():
    assert set(SNIPPETS) == set(cpu.PATCHES)


@pytest.mark.parametrize("name", cpu.PATCHES)
def test_without_the_patch_megatron_fails_for_want_of_cuda(outcomes, name):
    """Should this fail after an update of Megatron, the entry can go."""
    last = outcomes[1][name]
    assert [with_patch for with_patch, _ in (rank[name] for rank in outcomes)] == ["ok", "ok"]
    assert "CUDA" in last[1] or "NVIDIA" in last[1] or "cuda" in last[1], last


def test_torch_itself_is_not_changed(alone_and_enabled):
    """The patched modules see the CPU in place of a device, everybody else an honest torch without CUDA."""
    from megatron.core import utils

    assert utils.torch is not torch and utils.torch.cuda.current_device() == torch.device("cpu")
    assert utils.torch.zeros(2, device="cuda").device.type == "cpu"
    assert utils.torch.nn is torch.nn and utils.torch.Tensor is torch.Tensor
    for attempt in (torch.cuda.current_device, torch.cuda.synchronize, lambda: torch.zeros(1, device="cuda"), torch.cuda.get_rng_state):
        with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
            attempt()
    others = [name for name in ("megatron.core.optimizer.clip_grads", "megatron.core.transformer.attention") if _patched(name)]
    assert not others


def test_the_rng_tracker_forks_and_restores_the_generator(alone_and_enabled):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    def draws(seed):
        model_parallel_cuda_manual_seed(seed)
        outside = torch.get_rng_state()
        with get_cuda_rng_tracker().fork():
            first = torch.rand(3)
        assert torch.equal(torch.get_rng_state(), outside)
        with get_cuda_rng_tracker().fork():
            second = torch.rand(3)
        return first, second

    (first, second), again, other = draws(1), draws(1), draws(2)
    assert not torch.equal(first, second), "the fork must go on where it stopped"
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, other[0])


@pytest.fixture
def alone_and_enabled():
    from tests.parallel.helpers import one_process

    with one_process():
        yield
