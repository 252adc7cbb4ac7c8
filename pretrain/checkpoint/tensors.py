"""The tensors of a saved state, whole, for comparisons outside of any run."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def read_tensors(checkpoint: Path) -> "dict[str, torch.Tensor]":
    """name -> tensor, all of them in memory. Raises ValueError where the table of contents cannot be read or names more than
    tensors need, and what torch.distributed.checkpoint raises for the other files."""
    import torch
    import torch.distributed.checkpoint as dcp

    from megatron_qsparse.parallel.metadata import read_metadata
    from megatron_qsparse.parallel.state_files import StateFiles
    from pretrain.checkpoint.directory import STATE_NAME

    directory = checkpoint / STATE_NAME
    stored = read_metadata(directory).state_dict_metadata
    state = {name: torch.empty(item.size, dtype=item.properties.dtype) for name, item in stored.items() if hasattr(item, "size")}
    dcp.load(state, storage_reader=StateFiles(directory), no_dist=True)
    return state
