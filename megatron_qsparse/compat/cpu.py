"""Megatron-Core on machines without CUDA.

Megatron-Core's layers, groups and schedules run on a CPU with gloo, but some modules name the CUDA device literally. Where
an option or a spec slot avoids the code (`use_cpu_initialization`, no fusions, own norm and attention) that road is taken.
What is left is listed in `PATCHES`: in each named module, and only there, the global name `torch` is replaced by a view of
torch whose CUDA device is the CPU. Neither torch itself nor any other library sees a change, and nothing is replaced where
CUDA exists.
"""

import contextlib
import importlib
import types
from collections.abc import Iterator

import torch
import torch.distributed as dist

_CPU = torch.device("cpu")

PATCHES = {
    "megatron.core.models.common.embeddings.rotary_pos_embedding": "inv_freq goes to torch.cuda.current_device() (line 162)",
    "megatron.core.tensor_parallel.layers": "sequence-parallel buffers on torch.cuda.current_device() (lines 552, 597)",
    "megatron.core.tensor_parallel.mappings": "gather, scatter and all-to-all buffers on torch.cuda.current_device() (lines 91, "
    "141, 148, 181, 442); an all_gather of shards of different lengths (line 151), which gloo refuses",
    "megatron.core.tensor_parallel.random": "the RNG tracker keeps CUDA generator states (line 190)",
    "megatron.core.transformer.moe.router": "a router's weight goes to torch.cuda.current_device() (line 90)",
    "megatron.core.transformer.moe.token_dispatcher": "the all-to-all dispatcher makes a CUDA stream and event (lines 445, 871-899)",
    "megatron.core.utils": "GlobalMemoryBuffer allocates on torch.cuda.current_device() (line 631)",
    "megatron.core.pipeline_parallel.schedules": 'total_num_tokens on device="cuda" (lines 596, 983, 2138)',
    "megatron.core.pipeline_parallel.p2p_communication": "receive buffers on torch.cuda.current_device() (lines 313, 321)",
    "megatron.core.dist_checkpointing.strategies.filesystem_async": "torch.cuda.synchronize before writing (line 230)",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": "failure flag on torch.cuda.current_device() (line 252)",
}
"""Module -> what in it needs CUDA, by the line numbers of megatron-core 0.16.1. `_use_cpu_generator` replaces three names more and
`_use_host_splits` one. The two of dist_checkpointing are needed by Megatron's own writer only: this project has another one, and
tests write states of the first format with it."""

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like", "randn", "rand")


class _NoStream:
    """Stream and event of a device that does everything in order."""

    def wait_stream(self, stream) -> None: ...

    def record_event(self) -> "_NoStream":
        return self

    def synchronize(self) -> None: ...


_STREAM = _NoStream()


class _CudaView(types.ModuleType):
    """torch.cuda for a process whose only device is the CPU; everything not defined here is torch.cuda's own."""

    def __init__(self):
        super().__init__("torch.cuda")

    def __getattr__(self, name):
        return getattr(torch.cuda, name)

    current_device = staticmethod(lambda: _CPU)
    synchronize = staticmethod(lambda device=None: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    Stream = staticmethod(lambda: _STREAM)
    current_stream = staticmethod(lambda: _STREAM)
    stream = staticmethod(lambda stream: contextlib.nullcontext())
    manual_seed = staticmethod(lambda seed: torch.default_generator.manual_seed(seed) and None)


class _DistributedView(types.ModuleType):
    """torch.distributed, with an all_gather that takes shards of different lengths on gloo as it does on nccl."""

    def __init__(self):
        super().__init__("torch.distributed")

    def __getattr__(self, name):
        return getattr(dist, name)

    @staticmethod
    def all_gather(tensor_list, tensor, group=None):
        if len({part.shape for part in tensor_list}) == 1:
            return dist.all_gather(tensor_list, tensor, group=group)
        for source, part in enumerate(tensor_list):
            if source == dist.get_rank(group):
                part.copy_(tensor)
            dist.broadcast(part, group=group, group_src=source)


class _TorchView(types.ModuleType):
    """torch, with `.cuda` and `.distributed` replaced and device="cuda" read as the CPU by the tensor factories."""

    def __init__(self):
        super().__init__("torch")
        self.cuda = _CudaView()
        self.distributed = _DistributedView()
        for name in _FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(factory):
        def create(*args, **kwargs):
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return create


_VIEW = _TorchView()


def needed() -> bool:
    """Whether this process has no CUDA device."""
    return not torch.cuda.is_available()


def enable() -> None:
    """Apply `PATCHES`, switch Megatron's jit fuser off and keep its RNG states with the CPU generator. No-op with CUDA."""
    if not needed():
        return
    from megatron.core import jit

    jit.disable_jit_fuser()
    for name in PATCHES:
        importlib.import_module(name).torch = _VIEW
    _use_cpu_generator()
    _use_host_splits()
    _use_eager_router()


def _use_cpu_generator() -> None:
    """Megatron's tracker reads and writes generator states through these two functions; recompute needs them too.

    Its `fork` also warns when the CPU generator moved inside, which is meant here, so the tracker's own fork is replaced.
    """
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cpu", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self, name=random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    random.CudaRNGStatesTracker.fork = fork


def _use_host_splits() -> None:
    """The dispatcher's split sizes become numpy arrays where they come from a CUDA device (moe_utils.py line 1093); from a CPU they
    stay tensors, which `all_to_all_single` refuses.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def on_host(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = on_host


def _use_eager_router() -> None:
    """The jit fuser is torch.compile for what was imported before it was switched off: of that, only this runs here (router.py
    line 531).
    """
    from megatron.core.transformer.moe.router import TopKRouter

    method = TopKRouter._apply_expert_bias
    TopKRouter._apply_expert_bias = getattr(method, "_torchdynamo_orig_callable", method)
