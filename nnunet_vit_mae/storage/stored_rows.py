"""Rows of a large array in an `.npz` file, read side by side: no more than a part of each row is in memory.

The rows of an array (channels of probabilities) lie one behind the other in one compressed stream, which can only be
read from its start. It is therefore read once as a whole, part by part, and the state of the decompressor is kept where
each row begins (zlib's window, 40 kB). From then on every row can be read from its own beginning.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

PIECE = 2**16  # bytes that are read or decompressed at a time; each place keeps this many
AT_ONCE = 2**20  # numbers that are checked at a time
LOCAL_HEADER = 30  # bytes of a zip member's header, whose last four are the lengths of a name and an extra field


class StoredRows:
    """A floating-point array in an `.npz` file, of which parts of all rows (along the first axis) can be read.

    Args:
        file: The `.npz` file.
        name: The name of the array in it.

    Raises:
        Exception: Whatever zip and NumPy raise for a damaged file; `ValueError` if the array holds no such numbers.
    """

    def __init__(self, file: Path, name: str):
        self.file, self.name = file, name
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not a zip file")
        with zipfile.ZipFile(file) as archive:
            self._member = archive.getinfo(f"{name}.npy")
            with archive.open(self._member) as stream:
                version = np.lib.format.read_magic(stream)
                reads = (
                    np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                )
                self.shape, is_by_column, self.dtype = reads(stream)
                self._header = stream.tell()
        self._is_by_row = not is_by_column and self._member.compress_type == zipfile.ZIP_DEFLATED
        if self.dtype.kind != "f":
            raise ValueError(f"it holds no {name}")

    def read(self) -> np.ndarray:
        """Read the whole array. Raises `ValueError` for NaN and infinite values."""
        with self.file.open("rb") as content, np.load(content, allow_pickle=False) as stored:
            array = stored[self.name]
        if not np.isfinite(array).all():
            raise ValueError("it holds NaN or infinite values")
        return array

    def check(self) -> None:
        """Read all of it once. Raises what `starts` raises."""
        if self._is_by_row:
            _ = self.starts
        else:
            self.read()

    def parts(self, size: int) -> Iterator[np.ndarray]:
        """Yield the array, flattened to (rows, n), in parts of `size` columns.

        An array that is not compressed by rows, as nnU-Net's are, is read as a whole.
        """
        columns = math.prod(self.shape[1:])
        if not self._is_by_row:
            whole = self.read().reshape(self.shape[0], columns)
            yield from (whole[:, start : start + size] for start in range(0, columns, size))
            return
        starts = self.starts
        with self.file.open("rb") as stream:
            rows = [_Row(stream, start) for start in starts]
            for start in range(0, columns, size):
                yield np.stack([row.read(min(size, columns - start), self.dtype) for row in rows])

    @cached_property
    def starts(self) -> list[_Start]:
        """Where each row begins. Raises `ValueError` for NaN and infinite values, zlib's errors for a damaged file."""
        columns, starts = math.prod(self.shape[1:]), []
        with self.file.open("rb") as stream:
            row = _Row(stream, self._first(stream))
            checksum = zlib.crc32(row.read(self._header, np.dtype(np.uint8)).data)
            for _ in range(self.shape[0]):
                starts.append(row.here())
                for start in range(0, columns, AT_ONCE):
                    part = row.read(min(AT_ONCE, columns - start), self.dtype)
                    if not np.isfinite(part).all():
                        raise ValueError("it holds NaN or infinite values")
                    checksum = zlib.crc32(part.view(np.uint8).data, checksum)
        if checksum != self._member.CRC:
            raise ValueError("its checksum is wrong")
        return starts

    def _first(self, stream: BinaryIO) -> _Start:
        """Return the start of the compressed bytes, behind the header of the member and its name."""
        stream.seek(self._member.header_offset)
        lengths = struct.unpack("<HH", stream.read(LOCAL_HEADER)[-4:])
        first = self._member.header_offset + LOCAL_HEADER + sum(lengths)
        return _Start(first, self._member.compress_size, zlib.decompressobj(-zlib.MAX_WBITS))


@dataclass(frozen=True)
class _Start:
    """A place in a compressed stream."""

    offset: int  # in the file, of what the decompressor has not taken yet
    left: int  # bytes from there on
    state: Any  # of the decompressor


class _Row:
    """Reads a compressed stream on from a place; several may share a file."""

    def __init__(self, stream: BinaryIO, start: _Start):
        self.stream, self.offset, self.left, self.state = stream, start.offset, start.left, start.state.copy()
        self.waiting = b""  # read, and not decompressed

    def here(self) -> _Start:
        """Return the place that was reached."""
        waiting = len(self.waiting)
        return _Start(self.offset - waiting, self.left + waiting, self.state.copy())

    def read(self, number: int, dtype: np.dtype) -> np.ndarray:
        """Return the next numbers. Raises `EOFError` at the end of the stream."""
        values = np.empty(number, dtype)
        missing = values.view(np.uint8).data
        while missing:
            if not self.waiting:
                self.stream.seek(self.offset)
                self.waiting = self.stream.read(min(PIECE, self.left))
                self.offset, self.left = self.offset + len(self.waiting), self.left - len(self.waiting)
            piece = self.state.decompress(self.waiting, min(PIECE, len(missing)))
            if not piece and not self.waiting:
                raise EOFError("it is cut off")
            self.waiting = self.state.unconsumed_tail
            missing[: len(piece)] = piece
            missing = missing[len(piece) :]
        return values
