"""Bytes of plain and compressed files, and their lines without copies."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data_tools.errors import DataError

READ_BYTES = 256 << 10
LINE_BUFFER_BYTES = 4 << 20


def open_bytes(path: Path, compression: str | None) -> BinaryIO:
    """The bytes of a file without its compression (`gzip`, `zstandard` or None).

    Reading raises DataError for corrupt or truncated zstandard data, and for gzip what the gzip module raises
    (zlib.error, gzip.BadGzipFile, EOFError).
    """
    if compression == "gzip":
        return io.BufferedReader(gzip.open(path, "rb"), READ_BYTES)
    if compression == "zstandard":
        return io.BufferedReader(ZstandardFile(path), READ_BYTES)
    return open(path, "rb")


def split_lines(file: BinaryIO) -> Iterator[memoryview]:
    """The lines of a file without their newline, each valid until the next is asked for.

    They are views of one buffer that is used again and again: fresh memory for each line would cost as much as parsing it.
    """
    buffer = bytearray(LINE_BUFFER_BYTES)
    start = end = 0
    while True:
        view = memoryview(buffer)
        while (newline := buffer.find(b"\n", start, end)) >= 0:
            yield view[start:newline]
            start = newline + 1
        rest = bytes(view[start:end])
        if len(rest) > len(buffer) // 2:
            buffer = bytearray(2 * len(buffer))
            view = memoryview(buffer)
        start, end = 0, len(rest)
        view[:end] = rest
        count = file.readinto(view[end:])
        if not count:
            if rest:
                yield view[:end]
            return
        end += count


class ZstandardFile(io.RawIOBase):
    """A zstandard file of any number of frames. Unlike the library's own stream reader it notices a missing end."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self.path = path
        self.file = open(path, "rb")
        self.new_frame = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self.error = zstandard.ZstdError
        self.frame = self.new_frame()
        self.inside_frame = False
        self.input = b""
        self.output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.output:
            if not self.input:
                self.input = self.file.read(READ_BYTES)
                if not self.input:
                    if self.inside_frame:
                        raise DataError(f"{self.path}: truncated zstandard data; write the file again")
                    return 0
            try:
                self.output = memoryview(self.frame.decompress(self.input))
            except self.error as error:
                raise DataError(f"{self.path}: corrupt zstandard data ({error}); write the file again") from error
            self.input = self.frame.unused_data
            self.inside_frame = not self.frame.eof
            if self.frame.eof:
                self.frame = self.new_frame()
        count = min(len(buffer), len(self.output))
        buffer[:count] = self.output[:count]
        self.output = self.output[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
