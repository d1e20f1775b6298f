"""The numpy reference against formulas that share nothing with it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import ReduceOp, numpy_backend, scale
from kernels.dtypes import BFLOAT16, SHORT_FLOATS

SHORT = sorted(SHORT_FLOATS, key=str)
INTEGERS = [np.dtype(f"{sign}{size}") for sign in "iu" for size in (1, 2, 4, 8)]


def combine(op: ReduceOp, *values: object, dtype: np.dtype[Any]) -> Any:
    arrays = [np.array([value], dtype) for value in values]
    out = np.empty(1, dtype)
    numpy_backend.reduce_many(op, arrays, out)
    return out[0]


def nearest_short(value: float, dtype: np.dtype[Any]) -> float:
    """`value` rounded once to nearest even: scaled to whole units, rounded, scaled back."""
    bfloat16, float16 = (8, -133, 3.3895313892515355e38), (11, -24, 65504.0)
    mantissa_bits, smallest_exponent, largest = bfloat16 if dtype == BFLOAT16 else float16
    if value == 0.0 or math.isinf(value):
        return value
    unit = max(math.frexp(value)[1] - mantissa_bits, smallest_exponent)
    rounded = math.ldexp(round(math.ldexp(value, -unit)), unit)
    return math.copysign(math.inf if abs(rounded) > largest else abs(rounded), value)


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize(("op", "exact"), [(ReduceOp.SUM, operator.add), (ReduceOp.PROD, operator.mul)])
@given(bits=st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)))
def test_16_bit_pairs_round_once(
    dtype: np.dtype[Any], op: ReduceOp, exact: Callable[[float, float], float], bits: tuple[int, int]
) -> None:
    pair = np.array(bits, np.uint16).view(dtype)
    a, b = map(float, pair)
    if not (math.isfinite(a) and math.isfinite(b)):
        return
    out = np.empty(1, dtype)
    numpy_backend.reduce_many(op, (pair[:1], pair[1:]), out)
    with np.errstate(over="ignore"):
        in_float32 = float(np.float32(exact(a, b)))
    assert float(out[0]) == nearest_short(in_float32, dtype)


def test_16_bit_floats_round_only_at_the_end() -> None:
    assert combine(ReduceOp.SUM, 2048, 1, 1, dtype=np.dtype(np.float16)) == 2050
    assert combine(ReduceOp.SUM, 256, 1, 1, dtype=BFLOAT16) == ml_dtypes.bfloat16(258)
    assert combine(ReduceOp.SUM, 60000, 60000, -60000, dtype=np.dtype(np.float16)) == 60000


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@given(data=st.data())
def test_integers_wrap(dtype: np.dtype[Any], data: st.DataObject) -> None:
    limits = np.iinfo(dtype)
    a, b = (data.draw(st.integers(int(limits.min), int(limits.max))) for _ in range(2))
    modulus = 1 << limits.bits
    for op, exact in ((ReduceOp.SUM, a + b), (ReduceOp.PROD, a * b)):
        assert int(combine(op, a, b, dtype=dtype)) == (exact - int(limits.min)) % modulus + int(limits.min)


@pytest.mark.parametrize(("op", "expected"), [
    (ReduceOp.SUM, [0, 1, 1, 1]), (ReduceOp.PROD, [0, 0, 0, 1]), (ReduceOp.MIN, [0, 0, 0, 1]),
    (ReduceOp.MAX, [0, 1, 1, 1]),
    (ReduceOp.BAND, [0, 0, 0, 1]), (ReduceOp.BOR, [0, 1, 1, 1]), (ReduceOp.BXOR, [0, 1, 1, 0]),
])  # fmt: skip
def test_bool_is_logic(op: ReduceOp, expected: list[int]) -> None:
    out = np.empty(4, np.bool_)
    numpy_backend.reduce_many(op, (np.array([0, 0, 1, 1], np.bool_), np.array([0, 1, 0, 1], np.bool_)), out)
    assert out.tolist() == [bool(value) for value in expected]


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), *SHORT], ids=str)
@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX], ids=lambda op: op.name)
def test_nan_wins(op: ReduceOp, dtype: np.dtype[Any]) -> None:
    assert math.isnan(combine(op, math.nan, 1.0, dtype=dtype))
    assert math.isnan(combine(op, 1.0, math.nan, dtype=dtype))
    assert math.isnan(combine(op, math.nan, -math.inf, 1.0, dtype=dtype))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), *SHORT], ids=str)
@pytest.mark.parametrize("pair", [(0.0, -0.0), (-0.0, 0.0)], ids=["plus-first", "minus-first"])
def test_minus_zero_is_below_plus_zero(pair: tuple[float, float], dtype: np.dtype[Any]) -> None:
    assert math.copysign(1.0, combine(ReduceOp.MIN, *pair, dtype=dtype)) == -1.0
    assert math.copysign(1.0, combine(ReduceOp.MAX, *pair, dtype=dtype)) == 1.0


@pytest.mark.parametrize("dtype", [np.dtype(np.complex64), np.dtype(np.complex128)], ids=str)
def test_complex(dtype: np.dtype[Any]) -> None:
    assert combine(ReduceOp.SUM, 1 + 2j, 3 - 5j, dtype=dtype) == 4 - 3j
    assert combine(ReduceOp.PROD, 1 + 2j, 3 - 5j, dtype=dtype) == (1 + 2j) * (3 - 5j)


@pytest.mark.parametrize("dtype", [*SHORT, *map(np.dtype, ("float32", "float64", "complex64", "complex128"))], ids=str)
def test_scale_multiplies_in_place(dtype: np.dtype[Any]) -> None:
    x = np.arange(-7, 8).astype(dtype)
    scale(x, 0.25)
    assert x.astype(np.complex128).tolist() == [value / 4 for value in range(-7, 8)]
