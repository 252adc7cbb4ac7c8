"""What a stored state holds: its table of contents, .metadata, read without running anything that it names.

torch.distributed.checkpoint writes that file with pickle and reads it with pickle.load (FileSystemReader.read_metadata, up to torch
2.13): whoever hands over a checkpoint then decides what runs here. This reader knows the names that such a file needs and refuses all
others. None of them becomes the class itself: each stands for an inert holder of what the file puts in, and torch's objects are
made from that once it is found to be in order. Imports torch only where its objects are asked for.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA_NAME = ".metadata"
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)


class _Held:
    """An object of the file: what it was called with, and the state that it was given."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _holders(module: str, *names: str) -> dict[tuple[str, str], Any]:
    return {(module, name): type(name, (_Held,), {}) for name in names}


_KNOWN: dict[tuple[str, str], Any] = {
    **_holders(
        "torch.distributed.checkpoint.metadata", "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    **_holders("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    **_holders("torch.serialization", "_get_layout"),
    # How and where it was written, which nobody asks: Megatron's writer, that of format 1, keeps its plans.
    **_holders("torch.distributed.checkpoint.planner", "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    **_holders("pathlib", "PosixPath"),
    **_holders("pathlib._local", "PosixPath"),
    ("torch", "Size"): tuple,
    **{("torch", name): name for name in DTYPES},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(
                f"{self._path} names {module}.{name}, which no state of this project does: nothing of it was run. Do not use it"
            )
        return _KNOWN[module, name]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a whole, and the pieces that it is stored in."""

    dtype: str
    """torch's name for it, e.g. bfloat16."""
    size: tuple[int, ...]
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """(offsets, sizes) of each."""


@dataclass(frozen=True)
class StoredPiece:
    """Where the bytes of a piece, or of an object, lie."""

    name: str
    offsets: tuple[int, ...] | None
    """Of the piece in the tensor; None of an object."""
    index: int | None
    file: str
    """In the directory of the state."""
    start: int
    length: int
    """Bytes."""


@dataclass(frozen=True)
class Contents:
    """All that a state holds."""

    tensors: dict[str, StoredTensor]
    objects: tuple[str, ...]
    """Names of pickled objects, which nothing reads."""
    pieces: tuple[StoredPiece, ...]
    version: str | None


def read_contents(directory: Path) -> Contents:
    """The contents of a state directory.

    Raises ValueError, naming the file, where it names anything that a table of contents does not need, or is none; OSError where
    it cannot be read.
    """
    path = directory / METADATA_NAME
    with path.open("rb") as file:
        unpickler = _Unpickler(file, path)
        try:
            return _contents(unpickler.load())
        except ValueError as error:
            raise error if str(path) in str(error) else ValueError(_no_contents(path, error)) from error
        except Exception as error:
            # Of a damaged pickle, whatever its bytes happen to mean (pickle's documentation promises no kind of exception).
            raise ValueError(_no_contents(path, error)) from error


def _no_contents(path: Path, error: Exception) -> str:
    return f"{path} is no table of contents of a state ({type(error).__name__}: {error}): it is damaged, or was written by something else"


def read_metadata(directory: Path) -> "Metadata":
    """The same as torch's own object; raising like `read_contents`."""
    import torch
    from torch.distributed.checkpoint import metadata
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    contents, entries = read_contents(directory), {}
    for name, tensor in contents.tensors.items():
        entries[name] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(dtype=getattr(torch, tensor.dtype)), torch.Size(tensor.size),
            [metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tensor.chunks],
        )  # fmt: skip
    entries |= {name: metadata.BytesStorageMetadata() for name in contents.objects}
    places = {
        metadata.MetadataIndex(piece.name, piece.offsets, piece.index): _StorageInfo(piece.file, piece.start, piece.length)
        for piece in contents.pieces
    }
    return metadata.Metadata(entries, None, places, metadata.StorageMeta(), contents.version)


def _contents(root: Any) -> Contents:
    fields = _fields(root, "Metadata")
    tensors, objects = {}, []
    for name, entry in _dict(fields["state_dict_metadata"]).items():
        if _is(entry, "BytesStorageMetadata"):
            objects.append(_of(str, name))
        else:
            tensors[_of(str, name)] = _tensor(_fields(entry, "TensorStorageMetadata"))
    version = fields.get("version")
    pieces = tuple(_pieces(_dict(fields["storage_data"])))
    return Contents(tensors, tuple(objects), pieces, None if version is None else _of(str, version))


def _tensor(fields: dict[str, Any]) -> StoredTensor:
    properties = fields["properties"]
    if not _is(properties, "TensorProperties"):
        raise ValueError("a tensor without properties")
    dtype, _layout, _requires_grad, _memory_format, _pinned = properties.state
    if dtype not in DTYPES:
        raise ValueError("a tensor without a dtype")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in _of(list, fields["chunks"])]
    return StoredTensor(dtype, _sizes(fields["size"]), tuple((_sizes(chunk["offsets"]), _sizes(chunk["sizes"])) for chunk in chunks))


def _pieces(places: dict[Any, Any]) -> Iterator[StoredPiece]:
    for key, value in places.items():
        index, info = _fields(key, "MetadataIndex"), _fields(value, "_StorageInfo")
        file = _of(str, info["relative_path"])
        if Path(file).name != file:
            raise ValueError(f"{file!r} is no file in the directory of the state")
        if info.get("transform_descriptors"):
            raise ValueError("transformed pieces, which this project does not write")
        offsets, hint = index.get("offset"), index.get("index")
        yield StoredPiece(
            _of(str, index["fqn"]), None if offsets is None else _sizes(offsets), None if hint is None else _of(int, hint), file,
            _of(int, info["offset"]), _of(int, info["length"]),
        )  # fmt: skip


def _is(held: Any, name: str) -> bool:
    return isinstance(held, _Held) and type(held).__name__ == name


def _fields(held: Any, name: str) -> dict[str, Any]:
    if not _is(held, name):
        raise ValueError(f"{type(held).__name__} in place of {name}")
    return _dict(held.state)


def _dict(value: Any) -> dict:
    return _of(dict, value)


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(_of(int, length) for length in _of(tuple, value))


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{type(value).__name__} in place of {kind.__name__}")
    return value
