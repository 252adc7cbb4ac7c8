"""Checkpoints that want to run code: pickles that make a file, the canary, when they are unpickled."""

import builtins
import functools
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata


class Call:
    """Unpickled it is what the function returns."""

    def __init__(self, function: Callable, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __call__(self):
        """Only callables may be pickled as functions."""

    def __reduce__(self):
        return self.function, self.arguments


def attacks(canary: Path) -> dict[str, tuple[Any, str]]:
    """Name -> (object whose unpickling makes the canary, a name that a refusal tells)."""
    command = f"touch '{canary}'"
    system = Call(os.system, command)
    return {
        "plain": (system, "system"),
        "partial": (Call(Call(functools.partial, os.system, command)), "functools.partial"),
        "getattr": (Call(Call(getattr, Call(builtins.__import__, "os"), "system"), command), "getattr"),
        "load_from_bytes": (Call(torch.storage._load_from_bytes, saved(system)), "load_from_bytes"),
    }


def saved(value: Any) -> bytes:
    """What torch.save makes of it."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def in_metadata(state: Path, attack: Any) -> None:
    """As a part of .metadata that torch passes on to whoever asks."""
    rewrite_metadata(state, lambda metadata: setattr(metadata, "planner_data", attack))


def in_tensors(state: Path, attack: Any) -> None:
    """In place of every tensor."""
    content = saved(attack)
    (state / "__0_0.distcp").write_bytes(content)

    def point_there(metadata: Metadata) -> None:
        metadata.storage_data = {index: _StorageInfo("__0_0.distcp", 0, len(content)) for index in metadata.storage_data}

    rewrite_metadata(state, point_there)


def in_common(state: Path, attack: Any) -> None:
    (state / "common.pt").write_bytes(saved(attack))


def rewrite_metadata(state: Path, change: Callable[[Metadata], None]) -> None:
    metadata = FileSystemReader(str(state)).read_metadata()
    change(metadata)
    (state / ".metadata").write_bytes(pickle.dumps(metadata))
