"""Parameters under ZeRO-3: each is cut into equal shares over the data-parallel ranks and is EMPTY while its module is not at work.

DeepSpeed makes a parameter whole for the forward and again for the backward of the module that owns it; at all other times
`param.numel() == 0` and only `whole_shape` tells what it is. Everything here takes parameters of the lower stages as well, which
are always whole, so that callers need not ask for the stage.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from megatron_qsparse.compat import deepspeed
from megatron_qsparse.models.memory import GATHERED_ELEMENTS


@dataclass(frozen=True, kw_only=True)
class PartitionSettings:
    """How long ZeRO-3 keeps a gathered weight, in elements. The defaults are DeepSpeed's; they leave a small model whole, so
    tests of ZeRO-3 set all of them to 0.
    """

    persistence_threshold: int = 100_000
    """A parameter of at most so many elements (norms) stays whole on every rank."""
    reuse_distance: int = GATHERED_ELEMENTS
    """A weight that is needed again before so many other elements were used is not released in between."""
    prefetch: int = 50_000_000
    """Elements gathered ahead of the module that needs them."""

    def deepspeed_keys(self) -> dict:
        """Entries of DeepSpeed's "zero_optimization"."""
        return {
            "stage3_param_persistence_threshold": self.persistence_threshold,
            "stage3_max_reuse_distance": self.reuse_distance,
            "stage3_prefetch_bucket_size": self.prefetch,
            # True would replace torch.nn.functional.linear for the whole process; Megatron's linears do not use it.
            "memory_efficient_linear": False,
        }


def is_partitioned(param: nn.Parameter) -> bool:
    """Whether ZeRO-3 owns this parameter."""
    return hasattr(param, "ds_id")


def whole_shape(param: nn.Parameter) -> torch.Size:
    """The shape that the parameter has on this tensor-parallel rank when it is whole."""
    return param.ds_shape if is_partitioned(param) else param.shape


@contextlib.contextmanager
def gathered(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters are whole inside, to be READ; to change one, use `write`.

    Collective: every data-parallel rank names the same parameters. Those that are whole already stay so. Raises RuntimeError
    for one that DeepSpeed is just gathering, which happens during a forward or backward only.
    """
    zero = deepspeed.load().zero
    states = zero.partition_parameters.ZeroParamStatus
    partitioned = [param for param in params if is_partitioned(param)]
    if any(param.ds_status is states.INFLIGHT for param in partitioned):
        raise RuntimeError("a parameter is being gathered: call this between steps, not during a forward or backward")
    empty = [param for param in partitioned if param.ds_status is states.NOT_AVAILABLE]
    with zero.GatheredParameters(empty, enabled=bool(empty)):
        yield


@torch.no_grad()
def write(param: nn.Parameter, whole: torch.Tensor) -> None:
    """Give a parameter the value `whole` (of `whole_shape`), in the working precision. Not collective: each rank keeps its share.

    The fp32 master weight is another tensor unless the model itself is fp32. Whoever writes weights must call
    `ZeroEngine.weights_changed`. For code that edits a model between steps, as tests do; checkpoints have ways of their own.
    """
    if not is_partitioned(param) or param.numel():
        param.data.copy_(whole.view(whole_shape(param)))
    if is_partitioned(param):
        share = param.ds_tensor
        first = param.ds_zero_partition_rank * share.numel()
        # The last shares are padded, and may be padding altogether.
        part = whole.reshape(-1)[first : first + share.numel()]
        share[: part.numel()].copy_(part)
