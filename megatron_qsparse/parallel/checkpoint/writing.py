"""Writes a snapshot in the format of megatron.core.dist_checkpointing, from any thread, over a process group of its own.

Megatron's own writer forks the training process, twice (filesystem_async.py), after starting a manager process at the first
save; this one needs neither, and hashes each file on its way to the disk instead of reading it again.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from megatron_qsparse.parallel.checkpoint.snapshot import Snapshot

COMMON_NAME = "common.pt"


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    size: int
    """Bytes."""
    sha256: str


def write(snapshot: Snapshot, weights_only: bool, directory: Path, group: dist.ProcessGroup) -> dict[str, FileRecord]:
    """Write this rank's part. Collective over the group, which must reach all ranks.

    Returns this rank's files by their names in the directory: those are durable (fsync), rank 0's common.pt and metadata.json
    and the directory itself are not yet. Raises torch's CheckpointException on every rank where any rank fails.
    """
    entries = snapshot.weights if weights_only else [*snapshot.weights, *snapshot.states, *snapshot.generators]
    keyed: dict[str, list[ShardedTensor]] = {}
    for entry in entries:
        keyed.setdefault(entry.key, []).append(entry)
    # The file system below syncs. No copying ahead: all tensors are in host memory, and torch would otherwise take the loader that
    # overlaps copies (filesystem.py _write_files_from_queue), with a stream on GPU 0 for a thread that has chosen no device.
    writer = FileSystemWriter(directory, sync_files=False, per_thread_copy_ahead=0)
    writer.fs = files = _RecordingFileSystem()
    planner = MCoreSavePlanner(flatten_state_dict=False)
    dcp.save(mcore_to_pyt_state_dict(keyed), storage_writer=writer, planner=planner, process_group=group)
    if dist.get_rank(group) == 0:
        content = snapshot.common | ({"content": "weights"} if weights_only else {})
        torch.save(content, directory / COMMON_NAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    return files.records


class _RecordingFileSystem(FileSystem):
    """Makes every file that is written through it durable, and keeps its size and checksum.

    torch's own fsync comes before the last bytes have left Python's buffer (filesystem.py: no flush before os.fsync).
    """

    def __init__(self):
        super().__init__()
        self.records: dict[str, FileRecord] = {}

    @contextlib.contextmanager
    def create_stream(self, path, mode: str) -> Iterator:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            recorder = _Recorder(stream)
            try:
                yield recorder
            except Exception as error:
                # torch's archive writer fails once more when it is closed, and with that hides why ("unexpected pos").
                raise (recorder.failure or error) from None
            recorder.close()
        self.records[Path(path).name] = FileRecord(recorder.size, recorder.digest.hexdigest())

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Recorder:
    """An output file that is only appended to, and durable once it is closed."""

    def __init__(self, file):
        self._file, self.size, self.digest = file, 0, hashlib.sha256()
        self.failure: OSError | None = None
        self.flush, self.fileno = file.flush, file.fileno

    def write(self, data) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self.digest.update(data)
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
