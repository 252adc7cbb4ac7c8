"""Where each tensor of this rank's part of the model lies in the whole model, as Megatron's sharded_state_dict tells it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import nn

from megatron_qsparse.parallel.partition import whole_shape


@dataclass(frozen=True)
class Place:
    """A parameter, or a persistent buffer, and its place.

    Some tensors are stored in several pieces (gate_up as its gate rows and its up rows); those have a factory, which cuts and
    merges. A place holds no data: it serves every tensor of the parameter's shape, such as its moments.
    """

    name: str
    """In this rank's model, e.g. decoder.layers.0.mlp.linear_fc1.weight; Megatron's key on disk knows no pipeline stages."""
    tensor: torch.Tensor
    """The parameter or buffer itself; empty outside of forward under ZeRO-3."""
    shape: tuple[int, ...]
    """Of this rank's tensor-parallel shard, whatever ZeRO does to it."""
    sharded: ShardedTensor | ShardedTensorFactory

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def is_parameter(self) -> bool:
        return isinstance(self.tensor, nn.Parameter)

    @property
    def is_first_copy(self) -> bool:
        """False where another tensor- or pipeline-parallel rank writes this tensor: norms, the second copy of a tied embedding."""
        *others, _data_parallel = self.sharded.replica_id
        return not any(others)

    def cut(self, whole: torch.Tensor, prefix: str = "") -> "Pieces":
        """This rank's tensor (or one like it) in the pieces that are stored, views of it where that is possible.

        whole: of `shape`, any dtype. prefix: put before the key on disk, e.g. "optimizer.exp_avg.".
        """
        key = f"{prefix}{self.sharded.key}"
        if isinstance(self.sharded, ShardedTensorFactory):
            factory = replace(self.sharded, key=key, data=whole)
            return Pieces(whole, factory.build(), factory.merge_fn)
        return Pieces(whole, [replace(self.sharded, key=key, data=whole, dtype=whole.dtype)], lambda pieces: pieces[0])


class Pieces:
    """One tensor as the ShardedTensors that are stored."""

    def __init__(self, whole: torch.Tensor, nested: list | dict, merge: Callable):
        self._whole, self._nested, self._merge = whole, dict_list_map_outplace(_contiguous, nested), merge

    def __iter__(self) -> Iterator[ShardedTensor]:
        """In the form that is written and read; what is read into them, `merged` finds."""
        return map(_without_prepended_axes, nested_values(self._nested))

    def merged(self) -> torch.Tensor:
        """The tensor from what now lies in the pieces."""
        storage = self._whole.untyped_storage().data_ptr()
        if all(piece.data.untyped_storage().data_ptr() == storage for piece in nested_values(self._nested)):
            # Views of the tensor that was cut: whoever filled them filled it.
            return self._whole
        return self._merge(dict_list_map_outplace(lambda piece: piece.data, self._nested))


def _contiguous(piece: ShardedTensor) -> ShardedTensor:
    return replace(piece, data=piece.data.detach().contiguous())


def _without_prepended_axes(piece: ShardedTensor) -> ShardedTensor:
    """The same place, with the axes of length 1 that Megatron prepends (the layer number) as axes of the data.

    Only then does Megatron's adapter to torch.distributed.checkpoint (checkpointable.py) take any selection of a tensor's
    pieces; with prepended axes it builds a torch ShardedTensor, which wants to know the owner of every other piece.
    """
    data = piece.data.view((1,) * piece.prepend_axis_num + tuple(piece.local_shape))
    return replace(piece, data=data, local_shape=tuple(data.shape), prepend_axis_num=0)


def places(model: nn.Module) -> list[Place]:
    """Of every parameter and persistent buffer of this rank, in the model's order, which is the same on all data-parallel ranks."""
    tensors = [*model.parameters(), *model.buffers()]
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    with _whole_shapes(tensors):
        found = {}
        for entry in nested_values(model.sharded_state_dict(metadata=metadata)):
            if isinstance(entry, ShardedObject):
                _refuse_extra_state(entry)
            else:
                found[id(entry.data)] = (entry.without_data(), tuple(entry.data.shape))
    lost = [name for name, param in model.named_parameters() if id(param) not in found]
    if lost:
        raise ValueError(f"sharded_state_dict knows no place for {', '.join(lost)}: a checkpoint would lack them")
    named = [*model.named_parameters(), *model.named_buffers()]
    return [Place(name, tensor, found[id(tensor)][1], found[id(tensor)][0]) for name, tensor in named if id(tensor) in found]


def _refuse_extra_state(entry: ShardedObject) -> None:
    """Megatron's linears announce an extra state and have none; Transformer Engine's fp8 layers do."""
    if entry.data is not None:
        raise ValueError(f"{entry.key}: layers with an extra state (Transformer Engine's fp8 scales) cannot be saved yet")


@contextlib.contextmanager
def _whole_shapes(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let tensors that ZeRO-3 emptied show the shape they have in forward (ds_shape), without memory behind it."""
    empty = {tensor: tensor.data for tensor in tensors if tensor.shape != whole_shape(tensor)}
    for tensor, data in empty.items():
        tensor.data = data.new_empty(1).expand(whole_shape(tensor))
    try:
        yield
    finally:
        for tensor, data in empty.items():
            tensor.data = data
