"""What is refused, and that the message tells what was given and what is expected."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kernels import ReduceOp, check, dtypes, reduce, reduce_many, scale, supported

Array = np.ndarray[Any, np.dtype[Any]]


def ones(count: int = 4, dtype: Any = np.float32) -> Array:
    return np.ones(count, dtype)


@pytest.mark.parametrize("op", [ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR], ids=lambda op: op.name)
def test_bitwise_operations_refuse_floats(op: ReduceOp) -> None:
    with pytest.raises(
        TypeError, match=rf"{op.name} does not reduce float32; operations that do: SUM, AVG, PROD, MIN, MAX"
    ):
        reduce(op, ones(), ones(), ones())


def test_average_of_integers_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"AVG does not reduce int32.*use SUM and divide"):
        reduce(ReduceOp.AVG, ones(4, np.int32), ones(4, np.int32), ones(4, np.int32))


def test_complex_numbers_have_no_order() -> None:
    with pytest.raises(TypeError, match=r"MIN does not reduce complex64"):
        reduce(ReduceOp.MIN, ones(4, np.complex64), ones(4, np.complex64), ones(4, np.complex64))


def test_float8_only_moves() -> None:
    dtype = np.dtype(ml_dtypes.float8_e4m3fn)
    assert not any(supported(op, dtype) for op in ReduceOp)
    with pytest.raises(TypeError, match=r"SUM does not reduce float8_e4m3fn; .*moving data only"):
        check(ReduceOp.SUM, dtype)


def test_an_operation_is_a_reduce_op() -> None:
    with pytest.raises(TypeError, match=r"op is 'sum'; expected a ReduceOp: SUM, AVG"):
        reduce("sum", ones(), ones(), ones())  # type: ignore[arg-type]


def test_dtypes_must_agree() -> None:
    with pytest.raises(TypeError, match=r"input 1 has dtype float64, expected float32"):
        reduce(ReduceOp.SUM, ones(), ones(4, np.float64), ones())


@pytest.mark.parametrize(
    "wrong", [ones(5), ones(4).reshape(2, 2), ones(8)[::2]], ids=["length", "dimensions", "strided"]
)
def test_shapes_must_agree(wrong: Array) -> None:
    with pytest.raises(ValueError, match=r"input 0 has shape .*; expected one dimension, contiguous, with 4 elements"):
        reduce(ReduceOp.SUM, wrong, ones(), ones())


def test_out_must_be_writable() -> None:
    out = ones()
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out is read-only"):
        reduce(ReduceOp.SUM, ones(), ones(), out)


def test_partial_overlap_is_refused() -> None:
    memory = ones(9)
    with pytest.raises(ValueError, match=r"input 0 and out overlap in part"):
        reduce(ReduceOp.SUM, memory[:8], ones(8), memory[1:])


def test_at_least_one_input() -> None:
    with pytest.raises(ValueError, match=r"at least one input"):
        reduce_many(ReduceOp.SUM, (), ones())


def test_integers_cannot_be_scaled() -> None:
    with pytest.raises(TypeError, match=r"int32"):
        scale(ones(4, np.int32), 0.5)


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", ">f4"])
def test_dtypes_that_cannot_travel(dtype: str) -> None:
    with pytest.raises(TypeError, match=r"x has dtype .*; expected one of bool, int8"):
        dtypes.check(np.dtype(dtype), "x")


def test_codes_are_stable() -> None:
    expected = (
        "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 "
        "bfloat16 float8_e4m3fn float8_e5m2"
    )
    assert [dtype.name for dtype in dtypes.DTYPES[:17]] == expected.split()
    assert all(dtypes.by_code(dtypes.code(dtype)) == dtype for dtype in dtypes.DTYPES)
    with pytest.raises(ValueError, match=r"dtype code 99 is unknown"):
        dtypes.by_code(99)
