"""The dtypes that a checkpoint stores, what safetensors calls them, and conversions that round once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from parallel.checkpoint.agreement import CheckpointError

if TYPE_CHECKING:
    from parallel.autograd import Array

BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)

CODES: Final = {
    "bool": "BOOL",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
}  # fmt: skip
"""What safetensors calls each dtype."""

_DTYPES: Final = {name: BFLOAT16 if name == "bfloat16" else np.dtype(name) for name in CODES}
_FLOATS: Final = {"float16", "bfloat16", "float32", "float64"}
_INTEGERS: Final = CODES.keys() - _FLOATS - {"bool"}


def check_dtype(dtype: object, name: str = "a piece") -> np.dtype[Any]:
    """Return the dtype of this name; raises CheckpointError, naming the tensor, if it cannot be stored."""
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else None
    if found is None:
        raise CheckpointError(f"{name} has dtype {dtype}; a checkpoint stores {', '.join(CODES)}")
    return found


def on_host(values: Array) -> npt.NDArray[Any]:
    """Return the values in this machine's memory: the array itself, or a copy of one on a device."""
    found: npt.NDArray[Any] = values if isinstance(values, np.ndarray) else values.get()
    return found


def raw(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the bytes as they are stored, little endian; a view wherever the values already lie so."""
    if sys.byteorder == "big" or values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("<"))
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def fingerprint(values: npt.NDArray[Any]) -> int:
    """Return the sum of the bytes, taken eight at a time: cheap, and different for replicas that drifted apart."""
    data = raw(values)
    whole = data.size // 8 * 8
    total = int(np.add.reduce(data[:whole].view(np.uint64), dtype=np.uint64))
    return (total + int.from_bytes(data[whole:].tobytes(), "little")) % 2**64


def convert(values: npt.NDArray[Any], dtype: np.dtype[Any], name: str) -> npt.NDArray[Any]:
    """Return the values in another dtype, each rounded once, to nearest with ties to even.

    Floats become any other floats (beyond the largest: infinity, as IEEE 754 has it) and integers any others
    that can hold them; raises CheckpointError, naming the tensor, for everything else.
    """
    if values.dtype == dtype:
        return values
    source, target = values.dtype.name, dtype.name
    check_conversion(source, target, name)
    if source in _FLOATS:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return (_to_odd_float32(values) if (source, target) == ("float64", "bfloat16") else values).astype(dtype)
    limits = np.iinfo(dtype)
    if values.size and not limits.min <= int(values.min()) <= int(values.max()) <= limits.max:
        raise CheckpointError(
            f"{name} is stored as {source} with values from {values.min()} to {values.max()}, which do not fit "
            f"{target}; load it as {source}"
        )
    return values.astype(dtype)


def check_conversion(source: str, target: str, name: str) -> None:
    """Raise CheckpointError, naming the tensor, unless `convert` takes the one dtype to the other."""
    for kind in (_FLOATS, _INTEGERS, {"bool"}):
        if source in kind and target in kind:
            return
    raise CheckpointError(f"{name} is stored as {source} and wanted as {target}; load it as {source}")


def _to_odd_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return float64 values rounded to odd in float32, from where another rounding to nearest is the only one.

    Going through float32 by nearest would round twice: first onto a tie of bfloat16, then to even.
    """
    near = values.astype(np.float32)
    back = near.astype(np.float64)
    bits = near.view(np.uint32)
    inexact = (back != values) & np.isfinite(values)
    bits -= inexact & (np.abs(back) > np.abs(values))
    bits |= inexact
    return near
