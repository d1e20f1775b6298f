"""The reference: every kernel in numpy, as short as it can be; other back ends agree with it bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kernels.dtypes import SHORT_FLOATS, kind_of
from kernels.ops import TABLE, ReduceOp

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Array = np.ndarray[Any, np.dtype[Any]]


def _maximum(a: Array, b: Array, out: Array | None = None) -> Array:
    """Maximum of IEEE 754-2019: -0 < +0; which of them numpy takes depends on the element's place."""
    result = np.where((a == 0) & (b == 0), a + b, np.maximum(a, b))
    return np.positive(result, out=out)


def _minimum(a: Array, b: Array, out: Array | None = None) -> Array:
    return np.negative(_maximum(-a, -b), out=out)


_ON_FLOATS: Final[dict[ReduceOp, Callable[..., Array]]] = {ReduceOp.MIN: _minimum, ReduceOp.MAX: _maximum}


def reduce_many(op: ReduceOp, inputs: Sequence[Array], out: Array) -> None:
    """Set `out` to inputs[0] op inputs[1] op …; 16-bit floats are accumulated in float32 and rounded once."""
    function: Callable[..., Array] = TABLE[op].function
    if kind_of(out.dtype) == "f":
        function = _ON_FLOATS.get(op, function)
    short = out.dtype in SHORT_FLOATS
    with np.errstate(all="ignore"):
        total = inputs[0].astype(np.float32) if short else inputs[0]
        for array in inputs[1:-1]:
            total = function(total, array.astype(np.float32) if short else array)
        last = inputs[-1].astype(np.float32) if short else inputs[-1]
        if len(inputs) == 1:
            out[:] = last
        elif short:
            out[:] = function(total, last).astype(out.dtype)
        else:
            function(total, last, out=out)


def scale(x: Array, factor: float) -> None:
    """Multiply `x` by `factor` in place: 16-bit floats through float32, complex numbers part by part."""
    with np.errstate(all="ignore"):
        if x.dtype in SHORT_FLOATS:
            x[:] = (x.astype(np.float32) * np.float32(factor)).astype(x.dtype)
        else:
            parts = x.view(x.real.dtype)
            parts *= parts.dtype.type(factor)
