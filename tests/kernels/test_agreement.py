"""Every back end against the numpy reference, bit for bit (what a NaN carries aside)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import ReduceOp, backend, dispatch, native_backend, numpy_backend, supported
from kernels.dtypes import BFLOAT16, DTYPES

Array = np.ndarray[Any, np.dtype[Any]]

COMBINATIONS = [(op, dtype) for op in ReduceOp for dtype in DTYPES if supported(op, dtype)]
COUNTS = (0, 1, 2, 3, 7, 13, 16, 17, 31, 63, 64, 65, 127, 257, 1021)


def native_backends() -> list[native_backend.NativeBackend]:
    try:
        return native_backend.available()
    except ImportError:
        return []


BACKENDS = native_backends()
on_each_backend = pytest.mark.parametrize("native", BACKENDS, ids=lambda native: native.name.replace(" ", "-"))


def random_array(dtype: np.dtype[Any], count: int, seed: int, offset: int = 0) -> Array:
    """Any bit pattern there is, NaN and subnormal numbers among them; unaligned by `offset`."""
    memory = np.frombuffer(np.random.default_rng(seed).bytes(count * dtype.itemsize + offset), np.uint8).copy()
    if dtype == np.bool_:
        memory &= 1
    return memory[offset:].view(dtype)


def parts(array: Array) -> Array:
    return array.view(array.real.dtype) if array.dtype.kind == "c" else array


def assert_same_bits(actual: Array, expected: Array) -> None:
    actual, expected = parts(actual), parts(expected)
    if actual.dtype == BFLOAT16 or actual.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            both_nan = np.isnan(actual.astype(np.float64)) & np.isnan(expected.astype(np.float64))
    else:
        both_nan = np.zeros(actual.shape, np.bool_)
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    different = np.flatnonzero((actual.view(bits) != expected.view(bits)) & ~both_nan)
    if different.size:
        first = different[0]
        pytest.fail(f"{different.size} differ, first at {first}: {actual[first]!r}, expected {expected[first]!r}")


def test_native_kernels_are_built_where_make_set_up_the_machine() -> None:
    if not BACKENDS:
        pytest.skip("the native module is not built here: numpy serves")
    assert BACKENDS[-1].name in {"native baseline", "native neon"}
    assert backend() == "numpy" or backend().startswith("native ")


@on_each_backend
@pytest.mark.parametrize(("op", "dtype"), COMBINATIONS, ids=lambda value: getattr(value, "name", str(value)))
@given(
    count=st.sampled_from(COUNTS),
    inputs=st.integers(1, 5),
    offset=st.integers(0, 7),
    seed=st.integers(0, 2**32 - 1),
)
def test_native_agrees_with_numpy(
    native: native_backend.NativeBackend,
    op: ReduceOp,
    dtype: np.dtype[Any],
    count: int,
    inputs: int,
    offset: int,
    seed: int,
) -> None:
    arrays = [random_array(dtype, count, seed + number, offset) for number in range(inputs)]
    expected, actual = np.empty(count, dtype), random_array(dtype, count, seed, offset)
    numpy_backend.reduce_many(op, arrays, expected)
    if not native.reduce_many(op, arrays, actual):
        assert dtype.kind == "c"
        return
    assert_same_bits(actual, expected)


@on_each_backend
@pytest.mark.parametrize(("op", "dtype"), COMBINATIONS, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_out_may_be_any_input(
    native: native_backend.NativeBackend, op: ReduceOp, dtype: np.dtype[Any], place: int
) -> None:
    arrays = [random_array(dtype, 131, seed) for seed in range(3)]
    expected = np.empty(131, dtype)
    numpy_backend.reduce_many(op, [array.copy() for array in arrays], expected)
    if native.reduce_many(op, arrays, arrays[place]):
        assert_same_bits(arrays[place], expected)


@on_each_backend
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_every_16_bit_pattern_survives_and_rounds_alike(
    native: native_backend.NativeBackend, dtype: np.dtype[Any]
) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    for other in (every, every[::-1].copy(), np.roll(every, 1), np.roll(every, 12345)):
        for op in (ReduceOp.SUM, ReduceOp.PROD, ReduceOp.MIN, ReduceOp.MAX):
            expected, actual = np.empty_like(every), np.empty_like(every)
            numpy_backend.reduce_many(op, (every, other), expected)
            assert native.reduce_many(op, (every, other), actual)
            assert_same_bits(actual, expected)


@on_each_backend
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)], ids=str)
@pytest.mark.parametrize("op", [ReduceOp.SUM, ReduceOp.PROD, ReduceOp.MIN, ReduceOp.MAX], ids=lambda op: op.name)
def test_special_values_in_every_pair(native: native_backend.NativeBackend, op: ReduceOp, dtype: np.dtype[Any]) -> None:
    limits = ml_dtypes.finfo(dtype)
    extremes = [float(limits.max), float(limits.tiny), float(limits.smallest_subnormal)]
    values = np.array([0.0, 1.0, *extremes, np.inf, np.nan], dtype)
    values = np.concatenate([values, -values])
    first, second = np.repeat(values, values.size), np.tile(values, values.size)
    expected, actual = np.empty_like(first), np.empty_like(first)
    numpy_backend.reduce_many(op, (first, second), expected)
    assert native.reduce_many(op, (first, second), actual)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize(("op", "dtype"), COMBINATIONS, ids=lambda value: getattr(value, "name", str(value)))
@pytest.mark.parametrize("place", [0, 1])
def test_public_reduce_works_in_place(op: ReduceOp, dtype: np.dtype[Any], place: int) -> None:
    pair = [random_array(dtype, 65, 3), random_array(dtype, 65, 4)]
    expected = np.empty(65, dtype)
    numpy_backend.reduce_many(op, [array.copy() for array in pair], expected)
    dispatch.reduce(op, pair[0], pair[1], pair[place])
    assert_same_bits(pair[place], expected)


@on_each_backend
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if supported(ReduceOp.AVG, dtype)], ids=str)
@given(count=st.sampled_from(COUNTS), offset=st.integers(0, 7), seed=st.integers(0, 2**32 - 1))
def test_scale_agrees_with_numpy(
    native: native_backend.NativeBackend, dtype: np.dtype[Any], count: int, offset: int, seed: int
) -> None:
    actual = random_array(dtype, count, seed, offset)
    expected = actual.copy()
    assert native.scale(actual, 1 / 3)
    numpy_backend.scale(expected, 1 / 3)
    assert_same_bits(actual, expected)


@on_each_backend
def test_native_kernels_leave_alone_what_does_not_fit(native: native_backend.NativeBackend) -> None:
    memory = np.arange(9, dtype=np.float32)
    read_only = np.zeros(8, np.float32)
    read_only.flags.writeable = False
    first, second = memory[:8].copy(), memory[1:].copy()
    refused = [
        (memory[:8], second, memory[1:]),
        (first[:7], second, np.empty_like(first)),
        (first, second, read_only),
        (first[::2], second[:4], np.empty(4, np.float32)),
    ]
    for a, b, out in refused:
        before = out.copy()
        assert not native.reduce(ReduceOp.SUM, a, b, out)
        assert not native.reduce_many(ReduceOp.SUM, (a, b), out)
        assert_same_bits(out, before)
    assert not native.reduce_many(ReduceOp.SUM, (), first)
    assert not native.scale(read_only, 2.0)
    assert not native.scale(np.ones(4, np.int32), 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("numpy", "numpy"),
        ("sse9", "COLLECTIVES_KERNELS is 'sse9'; expected one of auto, numpy, native, native-baseline"),
        *((native.name.replace(" ", "-").replace("neon", "baseline"), native.name) for native in BACKENDS),
    ],
)
def test_the_variable_chooses_the_back_end(choice: str, expected: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.backend())"],
        env=os.environ | {"COLLECTIVES_KERNELS": choice},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in result.stdout + result.stderr
