"""The kernels as the rest of the project calls them: arguments checked, back end chosen once, at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import native_backend, numpy_backend
from kernels.ops import ReduceOp, check

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, np.dtype[Any]]

_native = native_backend.load()


def backend() -> str:
    """Which back end serves: `native` with its instruction set, or `numpy`."""
    return _native.name if _native is not None else "numpy"


def reduce(op: ReduceOp, a: Array, b: Array, out: Array) -> None:
    """Set `out` to a op b, element by element; AVG adds, the division is the caller's.

    Arrays are one-dimensional, contiguous, of one dtype and length; `out` may be `a` or `b`, but not
    overlap them otherwise. 16-bit floats are computed in float32 and rounded once.
    Raises TypeError and ValueError for arrays that do not fit.
    """
    # Small calls count: the native back end refuses what does not fit, and only then are words looked for.
    if (
        _native is not None
        and a.dtype is out.dtype is b.dtype
        and a.ndim == b.ndim == out.ndim == 1
        and _native.reduce(op, a, b, out)
    ):
        return
    _check(op, (a, b), out)
    numpy_backend.reduce_many(op, (a, b), out)


def reduce_many(op: ReduceOp, inputs: Sequence[Array], out: Array) -> None:
    """Set `out` to inputs[0] op inputs[1] op …, as `reduce`; 16-bit floats are rounded only at the end."""
    _check(op, inputs, out)
    if _native is None or not _native.reduce_many(op, inputs, out):
        numpy_backend.reduce_many(op, inputs, out)


def scale(x: Array, factor: float) -> None:
    """Multiply `x` by `factor` in place, 16-bit floats through float32.

    `x` is as in `reduce`, of floats or complex numbers. Raises TypeError and ValueError for other arrays.
    """
    check(ReduceOp.AVG, x.dtype)
    if _native is None or not _native.scale(x, factor):
        numpy_backend.scale(x, factor)


def _check(op: ReduceOp, inputs: Sequence[Array], out: Array) -> None:
    check(op, out.dtype)
    if not out.flags.writeable:
        raise ValueError("out is read-only; pass a writable array")
    for number, array in enumerate((*inputs, out)):
        name = "out" if number == len(inputs) else f"input {number}"
        if array.dtype != out.dtype:
            raise TypeError(f"{name} has dtype {array.dtype}, expected {out.dtype} as out")
        if array.shape != out.shape or array.ndim != 1 or not array.flags.c_contiguous:
            expected = f"one dimension, contiguous, with {out.size} elements"
            raise ValueError(f"{name} has shape {array.shape}; expected {expected}")
        if array is not out and array.ctypes.data != out.ctypes.data and np.may_share_memory(array, out):
            raise ValueError(f"{name} and out overlap in part; pass the same array or arrays apart")
    if not inputs:
        raise ValueError("reduce_many needs at least one input")
