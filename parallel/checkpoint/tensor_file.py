"""Files of tensors in the safetensors format, written in one pass with their checksum, and read where it is needed.

The format is eight bytes with the length of a header, the header in JSON, and the values without gaps. The
safetensors package reads these files; its writer wants all tensors in memory at once, and neither computes a
checksum on the way nor sees to it that the file is on the disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from parallel.checkpoint.agreement import CheckpointError
from parallel.checkpoint.dtypes import CODES, check_dtype, raw

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import BinaryIO

# Bytes written or hashed at a time: few calls, and still in the cache from one to the other.
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its key there, dtype and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return math.prod(self.shape) * check_dtype(self.dtype, self.key).itemsize


@dataclass(frozen=True)
class Sum:
    """What a file must be: its size in bytes and its SHA-256."""

    size: int
    sha256: str

    def check(self, path: Path) -> None:
        """Raise CheckpointError unless the file is so, byte for byte."""
        self.check_size(path)
        digest = hashlib.sha256()
        block = bytearray(_BLOCK)
        with reading(path), path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
        if digest.hexdigest() != self.sha256:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is {digest.hexdigest()}, but that of the file which was saved is "
                f"{self.sha256}; restore the file, or load another step"
            )

    def check_size(self, path: Path) -> None:
        """Raise CheckpointError unless the file is there and has its size."""
        with reading(path):
            size = path.stat().st_size
        if size != self.size:
            raise CheckpointError(
                f"{path} is damaged: it has {size:,} bytes, but {self.size:,} were saved; "
                "restore the file, or load another step"
            )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's errors into a CheckpointError that says what cannot be read, and why."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}; restore the file, or load another step") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's errors into a CheckpointError that says what cannot be written, and why."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}; what was saved before is whole, so make room for the file, or give another place, and save again") from error  # fmt: skip


def write(
    path: Path, entries: Sequence[Entry], tensors: Iterable[npt.NDArray[Any]], metadata: Mapping[str, str] | None = None
) -> Sum:
    """Write a new file and have it on the disk; returns its size and checksum.

    `tensors` gives the values of each entry in turn and may make them as they are asked for. The entries come
    in the order of `ordered`, so that values lie at multiples of their size. Raises CheckpointError.
    """
    digest, size = hashlib.sha256(), 0
    with writing(path), path.open("xb", buffering=0) as file:
        size += _put(file, _header(entries, metadata or {}), digest)
        for entry, tensor in zip(entries, tensors, strict=True):
            data = raw(tensor)
            if data.size != entry.nbytes:
                raise ValueError(f"{entry} has {entry.nbytes} bytes, and was given {data.size}")
            size += _put(file, data.data, digest)
        os.fsync(file.fileno())
    return Sum(size, digest.hexdigest())


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries in the order of a file: wide dtypes first, then by key."""
    return sorted(entries, key=lambda entry: (-check_dtype(entry.dtype).itemsize, entry.key))


def _header(entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for entry in entries:
        document[entry.key] = {
            "dtype": CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _put(file: BinaryIO, data: bytes | memoryview, digest: Any) -> int:
    view = memoryview(data)
    for begin in range(0, len(view), _BLOCK):
        block = view[begin : begin + _BLOCK]
        digest.update(block)
        while block:
            block = block[file.write(block) :]
    return len(view)


class TensorFile:
    """A file of tensors, mapped into memory: only what is looked at is read from the disk.

    It stays mapped as long as there is a view of it. Raises CheckpointError if the file cannot be read or is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path), path.open("rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if self._size < 8 or length > self._size - 8:
                raise CheckpointError(f"{path} is damaged: it has {self._size:,} bytes, fewer than its header says")
            self._begin = 8 + length
            try:
                self._entries: dict[str, dict[str, Any]] = json.loads(file.read(length))
            except ValueError as error:
                raise CheckpointError(f"{path} is damaged: its header is no JSON: {error}") from error
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def values(self, key: str, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        """Return the elements of a tensor as a flat array that is backed by the file.

        Raises CheckpointError unless the file has that tensor, with this dtype and number of elements.
        """
        entry = self._entries.get(key, {})
        begin, end = entry.get("data_offsets", (0, 0))
        nbytes = count * dtype.itemsize
        expected = (CODES[dtype.name], count, nbytes)
        actual = (entry.get("dtype"), math.prod(entry.get("shape", (0,))), end - begin)
        if actual != expected or not 0 <= begin <= end <= self._size - self._begin:
            raise CheckpointError(
                f"{self.path} has (dtype, elements, bytes) {actual} for {key}, but the manifest says {expected}; "
                "the two are not of one checkpoint: restore both, or load another step"
            )
        return np.frombuffer(self._map, dtype.newbyteorder("<"), count, self._begin + begin)
