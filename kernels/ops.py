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

    @staticmethod
    def premultiplied_sum(factor: float) -> PremultipliedSum:
        """A sum to which each rank contributes its input times its own `factor`; floats and complex numbers only."""
        return PremultipliedSum(factor)


@dataclass(frozen=True, slots=True)
class PremultipliedSum:
    """Made by `ReduceOp.premultiplied_sum`; usable wherever an operation is."""

    factor: float


@dataclass(frozen=True, slots=True)
class Row:
    """One operation: its numpy function, and the kinds of dtype (b u i f c, as `kind_of` says) that it takes."""

    function: np.ufunc
    kinds: str


TABLE: Final[dict[ReduceOp, Row]] = {
    ReduceOp.SUM: Row(np.add, "buifc"),
    ReduceOp.AVG: Row(np.add, "fc"),
    ReduceOp.PROD: Row(np.multiply, "buifc"),
    ReduceOp.MIN: Row(np.minimum, "buif"),
    ReduceOp.MAX: Row(np.maximum, "buif"),
    ReduceOp.BAND: Row(np.bitwise_and, "bui"),
    ReduceOp.BOR: Row(np.bitwise_or, "bui"),
    ReduceOp.BXOR: Row(np.bitwise_xor, "bui"),
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
    fitting = (
        ", ".join(other.name for other in ReduceOp if supported(other, dtype)) or "none: it is for moving data only"
    )
    hint = "; use SUM and divide" if op is ReduceOp.AVG else ""
    raise TypeError(f"{op.name} does not reduce {dtype}; operations that do: {fitting}{hint}")
