"""The native back end: C++ loops compiled for several instruction sets; the best is chosen at import."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kernels import dtypes
from kernels.native_fused import NativeFused
from kernels.ops import TABLE, ReduceOp, supported

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, np.dtype[Any]]

CHOICES: Final = ("auto", "numpy", "native", "native-baseline", "native-avx2", "native-avx512")
"""What the variable COLLECTIVES_KERNELS may say."""


class NativeBackend:
    """The native kernels of one instruction set.

    Each method returns False, and has done nothing, where it has no kernel for the operation and dtype, or
    where the arrays are not what `kernels.reduce` asks for: of one size, contiguous, `out` writable, not
    overlapping in part. The caller has made sure that all arrays have the dtype of `out`.
    """

    def __init__(self, table: Any, fused: NativeFused) -> None:
        self.fused = fused
        self.name = f"native {table.name}"
        self.instruction_set = str(table.name)
        self._reduce, self._reduce_many, self._scale = table.reduce, table.reduce_many, table.scale
        self._codes = {
            (op, dtype): (row.code, dtypes.code(dtype))
            for op, row in TABLE.items()
            for dtype in dtypes.DTYPES
            if supported(op, dtype)
        }

    def reduce(self, op: ReduceOp, a: Array, b: Array, out: Array) -> bool:
        """Set `out` to a op b."""
        codes = self._codes.get((op, out.dtype))
        return codes is not None and bool(self._reduce(*codes, a, b, out))

    def reduce_many(self, op: ReduceOp, inputs: Sequence[Array], out: Array) -> bool:
        """Set `out` to inputs[0] op inputs[1] op …."""
        codes = self._codes.get((op, out.dtype))
        return codes is not None and bool(self._reduce_many(*codes, inputs, out))

    def scale(self, x: Array, factor: float) -> bool:
        """Multiply `x` by `factor`."""
        return bool(self._scale(dtypes.code(x.dtype), x, factor))


def available() -> list[NativeBackend]:
    """Return the back ends that this build has and this processor can run, the widest registers first.

    Raises ImportError where the native module is not built.
    """
    module = importlib.import_module("kernels._native")
    tables = zip(module.runnable_tables(), module.runnable_fused_tables(), strict=True)
    return [NativeBackend(table, NativeFused(module, fused)) for table, fused in tables]


def load() -> NativeBackend | None:
    """Return the back end that COLLECTIVES_KERNELS asks for (one of CHOICES); None: numpy serves.

    Raises ImportError when native kernels are asked for and cannot serve here.
    """
    wanted = os.environ.get("COLLECTIVES_KERNELS", "auto")
    if wanted not in CHOICES:
        raise ImportError(f"COLLECTIVES_KERNELS is {wanted!r}; expected one of {', '.join(CHOICES)}")
    if wanted == "numpy":
        return None
    try:
        backends = available()
    except ImportError as error:
        if wanted == "auto":
            return None
        message = f"COLLECTIVES_KERNELS is {wanted!r}, but the native module is not built ({error}): make setup"
        raise ImportError(message) from None
    if wanted in {"auto", "native"}:
        return backends[0]
    if wanted == "native-baseline":
        return backends[-1]
    for backend in backends:
        if wanted == f"native-{backend.instruction_set}":
            return backend
    can = ", ".join(backend.instruction_set for backend in backends)
    raise ImportError(f"COLLECTIVES_KERNELS is {wanted!r}, which this processor cannot run; it can: {can}")
