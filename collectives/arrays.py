"""What a caller passes, as the flat contiguous numpy arrays that the engine works on."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels import dtypes
from transports.errors import TransportUnavailable

Array = np.ndarray[Any, np.dtype[Any]]


def as_array(x: object, name: str) -> Array:
    """`x` as a numpy array that shares its memory: numpy arrays, CPU tensors by DLPack, anything with the buffer protocol.

    Raises TypeError for anything else, and for dtypes that cannot travel; TransportUnavailable for GPU arrays.
    """
    if isinstance(x, np.ndarray):
        array = x
    elif hasattr(x, "__cuda_array_interface__"):
        raise TransportUnavailable(
            f"{name} is on a GPU ({type(x).__module__}.{type(x).__name__}), and no transport of this communicator reaches it; "
            "copy it to the host first, for example with cupy.asnumpy(x) or x.cpu()"
        )
    elif hasattr(x, "__dlpack__"):
        array = np.from_dlpack(x)
    else:
        try:
            array = np.asarray(memoryview(x))  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                f"{name} must be an array (numpy, or anything with the buffer protocol or __dlpack__), not {type(x).__name__}; "
                "wrap numbers and lists with numpy.asarray"
            ) from None
    dtypes.check(array.dtype, name)
    return array


class Operand:
    """One argument of a call: `flat` is contiguous, and `write_back` copies it to the caller's array where that is strided."""

    def __init__(self, x: object, name: str, *, writable: bool = False) -> None:
        self.array = as_array(x, name)
        if writable and not self.array.flags.writeable:
            raise ValueError(
                f"{name} is read-only, and the result goes there; pass a writable array, for example {name}.copy()"
            )
        self.strided = not self.array.flags.c_contiguous
        self.flat: Array = np.ascontiguousarray(self.array).reshape(-1)

    def read_again(self) -> None:
        """Before a call that is made once more: take what the caller's array holds now."""
        if self.strided:
            self.flat[...] = self.array.reshape(-1)

    def write_back(self) -> None:
        """After the call: bring the result to the caller's memory."""
        if self.strided:
            self.array[...] = self.flat.reshape(self.array.shape)


def output_for(out: object | None, shape: tuple[int, ...], like: Array, collective: str) -> Operand:
    """The operand for `out`, or for a new array of `shape`; raises ValueError or TypeError where `out` does not fit."""
    if out is None:
        return Operand(np.empty(shape, like.dtype), "out", writable=True)
    operand = Operand(out, "out", writable=True)
    if operand.array.dtype != like.dtype:
        raise TypeError(f"{collective}: out has dtype {operand.array.dtype}, expected {like.dtype} as the input")
    expected = int(np.prod(shape, dtype=np.int64))
    if operand.array.size != expected:
        raise ValueError(
            f"{collective}: out has {operand.array.size} elements (shape {operand.array.shape}), expected {expected} (shape {shape})"
        )
    return operand


def check_apart(collective: str, source: Array, target: Array, allowed_offset: int | None) -> bool:
    """Whether input and output are in place as the collective allows; raises ValueError for any other overlap.

    `allowed_offset` is where the input may lie in the output, in elements (negative: the output in the input); None: nowhere.
    """
    if source.size == 0 or target.size == 0 or not np.may_share_memory(source, target):
        return False
    offset = (source.ctypes.data - target.ctypes.data) // source.itemsize
    if allowed_offset is not None and offset == allowed_offset:
        return True
    raise ValueError(
        f"{collective}: input and out overlap, other than in place; pass arrays that share no memory, or none as out"
    )


def nothing(like: Operand) -> Operand:
    """The empty operand of a rank that gives or gets nothing."""
    return Operand(np.empty(0, like.flat.dtype), "nothing")


def result_of(out: object | None, target: Operand) -> object:
    """What a call returns: the caller's `out` itself, or the array that was made for it."""
    return target.array if out is None else out
