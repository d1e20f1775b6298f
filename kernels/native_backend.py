"""The native back end: C++ loops compiled for several instruction sets, the best of which is chosen at run time."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from kernels.ops import ReduceOp

Array = np.ndarray[Any, np.dtype[Any]]

_ISAS: Final = ("baseline", "avx2", "avx512")
_OPS: Final = {op: number for number, op in enumerate(
    (ReduceOp.SUM, ReduceOp.PROD, ReduceOp.MIN, ReduceOp.MAX, ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)
)} | {ReduceOp.AVG: 0}  # fmt: skip
_DTYPES: Final = {name: number for number, name in enumerate(
    ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "bfloat16", "float32", "float64")
)}  # fmt: skip


class NativeBackend:
    """The native kernels of one instruction set."""

    def __init__(self, module: Any, isa: str) -> None:
        self.name = f"native {isa}"
        self._module, self._isa = module, _ISAS.index(isa)

    def reduce_many(self, op: ReduceOp, inputs: Sequence[Array], out: Array) -> bool:
        """As `kernels.reduce_many`, on checked arrays; False where there is no native kernel (complex numbers)."""
        dtype = _DTYPES.get(out.dtype.name)
        if dtype is None:
            return False
        addresses = [array.ctypes.data for array in inputs]
        return bool(self._module.reduce_many(self._isa, _OPS[op], dtype, addresses, out.ctypes.data, out.size))


def load() -> NativeBackend | None:
    """The back end that COLLECTIVES_KERNELS asks for (auto, numpy, native, native-ISA); None: numpy serves.

    Raises ImportError when native kernels are asked for and cannot serve here.
    """
    wanted = os.environ.get("COLLECTIVES_KERNELS", "auto")
    if wanted == "numpy":
        return None
    choices = ("auto", "numpy", "native", *(f"native-{isa}" for isa in _ISAS))
    if wanted not in choices:
        raise ImportError(f"COLLECTIVES_KERNELS is {wanted!r}; expected one of {', '.join(choices)}")
    try:
        module = importlib.import_module("kernels._native")
    except ImportError as error:
        if wanted == "auto":
            return None
        raise ImportError(
            f"COLLECTIVES_KERNELS is {wanted!r}, but the native module is not built ({error}): make setup"
        ) from None
    asked = [wanted.removeprefix("native-")] if wanted.startswith("native-") else list(reversed(_ISAS))
    for isa in asked:
        if module.has_isa(_ISAS.index(isa)):
            return NativeBackend(module, isa)
    raise ImportError(
        f"COLLECTIVES_KERNELS is {wanted!r}, which this processor or this build cannot run; leave it at auto"
    )
