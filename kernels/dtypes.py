"""The dtypes that can travel, with the small numbers that stand for them on the wire."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np

_NAMES: Final = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_EXTENDED: Final = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)

DTYPES: Final[tuple[np.dtype[Any], ...]] = (*map(np.dtype, _NAMES), *map(np.dtype, _EXTENDED))
"""Every dtype that can travel; its place is its code and never changes."""

BFLOAT16: Final = np.dtype(ml_dtypes.bfloat16)
SHORT_FLOATS: Final = frozenset((np.dtype(np.float16), BFLOAT16))
"""Dtypes whose arithmetic is done in float32 and rounded once."""

_CODES: Final = {dtype: code for code, dtype in enumerate(DTYPES)}


def code(dtype: np.dtype[Any]) -> int:
    """Return the dtype's number; raises KeyError for one that `check` refuses."""
    return _CODES[dtype]


def by_code(number: int) -> np.dtype[Any]:
    """Invert `code`; raises ValueError for an unknown number."""
    if not 0 <= number < len(DTYPES):
        raise ValueError(f"dtype code {number} is unknown; expected 0 to {len(DTYPES) - 1}")
    return DTYPES[number]


def kind_of(dtype: np.dtype[Any]) -> str:
    """b(ool), u(nsigned), i(nteger), f(loat), c(omplex), or x for dtypes without arithmetic here (float8)."""
    if dtype == BFLOAT16:
        return "f"
    # What numpy says of an extension dtype is no guide: float8_e5m2 has kind f there.
    return dtype.kind if dtype in _CODES and dtype.isbuiltin == 1 else "x"


def check(dtype: np.dtype[Any], name: str) -> None:
    """Raise TypeError, naming the argument and what is expected, unless the dtype can travel."""
    if dtype not in _CODES:
        hint = " in native byte order" if dtype.newbyteorder("=") in _CODES else ""
        expected = ", ".join(map(str, DTYPES))
        raise TypeError(f"{name} has dtype {dtype}; expected one of {expected}{hint}")
