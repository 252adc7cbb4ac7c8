"""torch's reader of a state's files, without its pickle.load of .metadata."""

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_qsparse.parallel.metadata import read_metadata


class StateFiles(FileSystemReader):
    """Reads the tensors of a state, which torch does with weights_only. Raises ValueError where .metadata names anything else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))
