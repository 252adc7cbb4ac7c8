"""The tensors of a saved state, whole, for comparisons outside of any run."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def read_tensors(checkpoint: Path) -> "dict[str, torch.Tensor]":
    """name -> tensor, all of them in memory. Raises what torch.distributed.checkpoint raises for files that cannot be read."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader

    from pretrain.checkpoint.directory import STATE_NAME

    reader = FileSystemReader(str(checkpoint / STATE_NAME))
    metadata = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in metadata.items() if hasattr(item, "size")}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state
