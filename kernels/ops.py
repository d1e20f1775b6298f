"""The reduction operations, and the one table of which dtypes each of them takes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np


class ReduceOp(Enum):
    """What a reduction computes; AVG is the sum divided by the number of ranks."""

    SUM = "sum"
    AVG = "avg"
    PROD = "prod"
    MIN = "min"
    MAX = "max"
    BAND = "band"
    BOR = "bor"
    BXOR = "bxor"

    # Members are singletons; Enum's own hash is a Python function, which small reductions would feel.
    __hash__ = object.__hash__

    @staticmethod
    def premultiplied_sum(factor: float) -> PremultipliedSum:
        """Return a sum of each rank's input times its own `factor`; floats and complex numbers only."""
        return PremultipliedSum(factor)


@dataclass(frozen=True, slots=True)
class PremultipliedSum:
    """Made by `ReduceOp.premultiplied_sum`; usable wherever an operation is."""

    factor: float


@dataclass(frozen=True, slots=True)
class Row:
    """One operation: numpy function, kinds of dtype (b u i f c, as `kind_of` says), code in native tables."""

    function: np.ufunc
    kinds: str
    code: int


TABLE: Final[dict[ReduceOp, Row]] = {
    ReduceOp.SUM: Row(np.add, "buifc", 0),
    ReduceOp.AVG: Row(np.add, "fc", 0),
    ReduceOp.PROD: Row(np.multiply, "buifc", 1),
    ReduceOp.MIN: Row(np.minimum, "buif", 2),
    ReduceOp.MAX: Row(np.maximum, "buif", 3),
    ReduceOp.BAND: Row(np.bitwise_and, "bui", 4),
    ReduceOp.BOR: Row(np.bitwise_or, "bui", 5),
    ReduceOp.BXOR: Row(np.bitwise_xor, "bui", 6),
}


def supported(op: ReduceOp, dtype: np.dtype[Any]) -> bool:
    """Whether `op` reduces arrays of `dtype`."""
    from kernels.dtypes import kind_of

    return kind_of(dtype) in TABLE[op].kinds


def check(op: ReduceOp, dtype: np.dtype[Any]) -> None:
    """Raise TypeError, saying what is supported, unless `op` reduces arrays of `dtype`."""
    if not isinstance(op, ReduceOp):
        raise TypeError(
            f"op is {op!r}; expected a ReduceOp: {', '.join(o.name for o in ReduceOp)}, or a premultiplied sum"
        )
    if supported(op, dtype):
        return
    names = ", ".join(other.name for other in ReduceOp if supported(other, dtype))
    fitting = names or "none: it is for moving data only"
    hint = "; use SUM and divide" if op is ReduceOp.AVG else ""
    raise TypeError(f"{op.name} does not reduce {dtype}; operations that do: {fitting}{hint}")
