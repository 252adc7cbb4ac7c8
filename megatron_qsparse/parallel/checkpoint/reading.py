"""Reads single tensors of a stored state, each rank for itself, without communication.

Memory: this rank's shard and one stored piece that it is cut from, so at most twice the largest parameter as it was stored,
which is whole where one tensor-parallel rank wrote it.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import maybe_load_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint import LoadPlan
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_qsparse.parallel.checkpoint.places import Place
from megatron_qsparse.parallel.checkpoint.snapshot import FORMAT_VERSION
from megatron_qsparse.parallel.checkpoint.writing import COMMON_NAME
from megatron_qsparse.parallel.metadata import METADATA_NAME
from megatron_qsparse.parallel.state_files import StateFiles


class Reader:
    """A state directory. Raises ValueError where it is none, or newer than this code."""

    def __init__(self, directory: Path):
        self.directory = directory
        try:
            config = maybe_load_config(str(directory))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{directory} was not written by this project: its metadata.json cannot be read ({error})") from error
        if config is None or config.sharded_backend != "torch_dist":
            raise ValueError(f"{directory} holds no state in the format torch_dist of megatron.core.dist_checkpointing")
        # Read before anything else: a newer format may hold other tensors.
        self.common = _common(directory)
        if self.common["format_version"] > FORMAT_VERSION:
            raise ValueError(
                f"{directory}: format {self.common['format_version']} is newer than {FORMAT_VERSION}, the newest this version reads"
            )
        self._files = StateFiles(directory)
        self._metadata = self._files.read_metadata()

    @property
    def weights_only(self) -> bool:
        return self.common.get("content") == "weights"

    def problems(self, place: Place, prefix: str = "") -> list[str]:
        """What keeps the tensor at this place from being read, in words."""
        stored, found = self._metadata.state_dict_metadata, []
        for piece in place.cut(torch.empty(place.shape, device="meta"), prefix):
            if not isinstance(stored.get(piece.key), TensorStorageMetadata):
                found.append(f"{piece.key} is not in {self.directory}")
            elif tuple(stored[piece.key].size) != piece.global_shape:
                # Also where Megatron allows it (embedding and output layer): zeros for the missing rows are no trained weights.
                shapes = f"{list(stored[piece.key].size)} in {self.directory}, {list(piece.global_shape)} in this model"
                found.append(f"{piece.key} has the shape {shapes}")
        return found

    def read(self, place: Place, dtype: torch.dtype, prefix: str = "") -> torch.Tensor:
        """This rank's shard of one tensor, on the CPU; stored tensors of another precision are converted."""
        pieces = place.cut(torch.empty(place.shape, dtype=dtype), prefix)
        keyed: dict[str, list[ShardedTensor]] = {}
        for piece in pieces:
            keyed.setdefault(piece.key, []).append(piece)
        self._read(keyed)
        return pieces.merged()

    def read_bytes(self, name: str) -> torch.Tensor | None:
        """A uint8 vector [n] that belongs to no place in the model; None where there is none of this name."""
        stored = self._metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata) or len(stored.size) != 1 or stored.properties.dtype != torch.uint8:
            return None
        data = torch.empty(stored.size, dtype=torch.uint8)
        self._read({name: [ShardedTensor.from_rank_offsets(name, data)]})
        return data

    def _read(self, keyed: dict[str, list[ShardedTensor]]) -> None:
        """Fill the entries' tensors, in place."""
        planner = MCoreLoadPlanner(shapes_validation_sharded_tensors=[entry for entries in keyed.values() for entry in entries])
        planner.set_up_planner(mcore_to_pyt_state_dict(keyed, is_loading=True), self._metadata, is_coordinator=True)
        self._files.set_up_storage_reader(self._metadata, is_coordinator=True)
        plan = planner.finish_plan(self._files.prepare_local_plan(planner.create_local_plan()))
        try:
            # Tensors only, which torch reads with weights_only; for objects its planner would call torch.load without that.
            self._files.read_data(plan, planner).wait()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{self._sources(plan)} {_refusal(error)}") from error
        except (AssertionError, LookupError, EOFError, RuntimeError, TypeError, AttributeError) as error:
            # Checksums were right: whoever wrote it has stored something else than .metadata says.
            raise ValueError(f"{self._sources(plan)} cannot be read ({type(error).__name__}: {error})") from error

    def _sources(self, plan: LoadPlan) -> str:
        """The files that a plan reads."""
        places = (self._metadata.storage_data.get(item.storage_index) for item in plan.items)
        names = {METADATA_NAME if place is None else place.relative_path for place in places}
        return " or ".join(str(self.directory / name) for name in sorted(names))


def _refusal(error: pickle.UnpicklingError) -> str:
    """What torch.load with weights_only has refused, in words."""
    named = re.search(r"GLOBAL ([\w.]*\w)", str(error))
    what = f"names {named[1]}, which no state of this project does" if named else "holds more than tensors"
    return f"{what}: nothing of it was run. Do not use it"


def _common(directory: Path) -> dict[str, Any]:
    """Content of common.pt. Raises ValueError where it was not written by `save`, say by Megatron's own trainer."""
    foreign = f"{directory} was not written by this project: its {COMMON_NAME}"
    try:
        content = torch.load(directory / COMMON_NAME, weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{foreign} is missing") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{directory / COMMON_NAME} {_refusal(error)}") from error
    except (RuntimeError, EOFError) as error:
        # A cut file is a RuntimeError.
        raise ValueError(f"{foreign} cannot be read ({type(error).__name__})") from error
    # Version 1 left the wording of this file to dist_checkpointing.save.
    content = content.get("common", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(type(content.get(name)) is int for name in ("format_version", "adam_step")):
        raise ValueError(f"{foreign} tells neither a format version nor Adam's step count")
    return content
