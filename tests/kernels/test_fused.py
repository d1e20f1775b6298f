"""The fused kernels of every back end against each other, bit for bit where they promise it, and row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import numpy_fused
from tests.kernels.fused_cases import (
    EXACT,
    NATIVE,
    ROUNDED,
    STREAM,
    Array,
    Case,
    Draw,
    on_each_backend,
    on_each_dtype,
    seeds,
    shapes,
    tolerance,
)


def name_of(case: Case) -> str:
    return case.__name__.removeprefix("run_")


@on_each_dtype
@pytest.mark.parametrize("case", EXACT + ROUNDED, ids=name_of)
@given(shape=shapes, seed=seeds)
def test_every_instruction_set_gives_the_same_bits(case: Case, dtype: Any, shape: tuple[int, int], seed: int) -> None:
    reference, *others = [[out.tobytes() for out in case(k, Draw(seed, dtype), *shape)] for k in NATIVE.values()] or [
        []
    ]
    assert all(other == reference for other in others)


@pytest.mark.parametrize("native", NATIVE.values(), ids=NATIVE)
@on_each_dtype
@pytest.mark.parametrize("case", EXACT, ids=name_of)
@given(shape=shapes, seed=seeds)
def test_what_only_rounds_has_the_bits_of_numpy(
    native: Any, case: Case, dtype: Any, shape: tuple[int, int], seed: int
) -> None:
    expected = case(numpy_fused, Draw(seed, dtype), *shape)
    for actual, wanted in zip(case(native, Draw(seed, dtype), *shape), expected, strict=True):
        assert actual.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("native", NATIVE.values(), ids=NATIVE)
@on_each_dtype
@pytest.mark.parametrize("case", ROUNDED, ids=name_of)
@given(shape=shapes, seed=seeds)
def test_native_is_numpy_to_rounding(native: Any, case: Case, dtype: Any, shape: tuple[int, int], seed: int) -> None:
    expected = case(numpy_fused, Draw(seed, dtype), *shape)
    for actual, wanted in zip(case(native, Draw(seed, dtype), *shape), expected, strict=True):
        limit = tolerance(dtype) * max(1.0, np.abs(wanted).max(initial=0), shape[1] / 8)
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=limit)


@on_each_backend
@on_each_dtype
@given(rows=st.integers(2, 9), columns=st.integers(1, 150), row=st.integers(0, 8), seed=seeds)
def test_a_row_has_the_same_bits_alone(backend: Any, dtype: Any, rows: int, columns: int, row: int, seed: int) -> None:
    row %= rows
    draw = Draw(seed, dtype)
    x, g, weight, bias = (draw.normal(*shape) for shape in ((rows, columns), (rows, columns), (columns,), (columns,)))
    targets = draw.generator.integers(0, columns, rows)

    def results(part: slice) -> list[Array]:
        count = len(x[part])
        mean, inverse, losses = np.empty(count, dtype), np.empty(count, dtype), np.empty(count)
        activated, slope, normed, of_x, softmax, of_logits, dropped = (np.empty_like(x[part]) for _ in range(7))
        backend.gelu(x[part], bias, activated)
        backend.gelu_backward(g[part], x[part], bias, slope)
        backend.layer_norm(x[part], weight, bias, 1e-5, normed, mean, inverse)
        sums = np.zeros_like(weight), np.zeros_like(bias)
        backend.layer_norm_backward(g[part], x[part], weight, mean, inverse, of_x, *sums)
        softmax[:] = x[part]
        backend.causal_softmax(softmax[None], 0.5, part.start + 1)
        backend.cross_entropy(x[part], targets[part], 0.5, losses, of_logits)
        backend.dropout(x[part], STREAM._replace(first=part.start * STREAM.row_stride), dropped)
        return [activated, slope, normed, mean, inverse, of_x, softmax, of_logits, losses, dropped]

    for together, alone in zip(results(slice(0, rows)), results(slice(row, row + 1)), strict=True):
        assert together[row].tobytes() == alone[0].tobytes()
