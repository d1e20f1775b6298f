"""What the tests of the fused kernels share: back ends, arrays, and a case for each kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from kernels import fused, native_backend, numpy_fused
from kernels.dtypes import BFLOAT16

Array = np.ndarray[Any, np.dtype[Any]]


def native_kernels() -> dict[str, Any]:
    try:
        return {backend.instruction_set: backend.fused for backend in native_backend.available()}
    except ImportError:
        return {}


NATIVE = native_kernels()
BACKENDS = {**NATIVE, "numpy": numpy_fused}
on_each_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
on_each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
FLOATS = [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16, np.dtype(np.float16)]
STEP = fused.AdamWStep(0.9, 0.95, 1e-8, 0.99, 2e-3, 3.0, 0.7)
STREAM = fused.DropoutStream((0x123456789ABCDEF0, 0xFEDCBA9876543210), 77, 1000, round(0.3 * 2**32), 1 / 0.7)

shapes = st.tuples(st.integers(1, 6), st.integers(1, 150))
seeds = st.integers(0, 2**32 - 1)


class Draw:
    """Random arrays, each starting anywhere in its memory."""

    def __init__(self, seed: int, dtype: Any) -> None:
        self.generator, self.dtype = np.random.default_rng(seed), np.dtype(dtype)

    def normal(self, *shape: int, scale: float = 1.0) -> Array:
        return self.place(self.generator.standard_normal(shape) * scale)

    def place(self, values: Array, dtype: Any = None) -> Array:
        start = int(self.generator.integers(0, 9))
        memory = np.empty(start + values.size, dtype or self.dtype)
        memory[start:] = values.reshape(-1)
        return memory[start:].reshape(values.shape)


def tolerance(dtype: Any) -> float:
    """Thirty units in the last place of numbers about 1."""
    return 30 * float(np.finfo(dtype).eps)


# Each case makes its arrays for a shape, calls one kernel and returns what it wrote. A case by rows gives each row
# the same bits whatever the others are.


def run_gelu(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    x, bias = draw.normal(rows, columns, scale=3), draw.normal(columns)
    k.gelu(x, bias, x)
    return (x,)


def run_gelu_backward(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    x, bias, g = draw.normal(rows, columns, scale=3), draw.normal(columns), draw.normal(rows, columns)
    k.gelu_backward(g, x, bias, g)
    return (g,)


def run_layer_norm(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    x, weight, bias = draw.normal(rows, columns), draw.normal(columns), draw.normal(columns)
    out, mean, inverse = np.empty_like(x), np.empty(rows, x.dtype), np.empty(rows, x.dtype)
    k.layer_norm(x, weight, bias, 1e-5, out, mean, inverse)
    return out, mean, inverse


def run_layer_norm_backward(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    x, g, weight, mean = draw.normal(rows, columns), draw.normal(rows, columns), draw.normal(columns), draw.normal(rows)
    inverse, of_weight, of_bias = abs(draw.normal(rows)), draw.normal(columns), draw.normal(columns)
    k.layer_norm_backward(g, x, weight, mean, inverse, g, of_weight, of_bias)
    return g, of_weight, of_bias


def run_causal_softmax(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    scores = draw.normal(2, rows, columns, scale=5)
    k.causal_softmax(scores, 0.3, columns - rows - 1)
    return (scores,)


def run_causal_softmax_backward(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    g, weights = draw.normal(2, rows, columns), abs(draw.normal(2, rows, columns))
    k.causal_softmax_backward(g, weights, 0.3, columns - rows - 1, g)
    return (g,)


def run_cross_entropy(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    logits, losses = draw.normal(rows, columns, scale=3), np.empty(rows)
    k.cross_entropy(logits, draw.generator.integers(0, columns, rows), 0.25, losses, logits)
    return logits, losses


def run_adamw(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    count = rows * columns * 7
    values, first, second = draw.normal(count), draw.normal(count), abs(draw.normal(count))
    gradients, copy = draw.normal(count), draw.place(np.zeros(count), BFLOAT16)
    k.adamw(values, gradients, first, second, STEP, None)
    k.adamw(values, draw.place(gradients, np.float16), first, second, STEP, copy)
    return values, first, second, copy


def run_dropout(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    x = draw.normal(rows, columns)
    k.dropout(x, STREAM, x)
    return (x,)


def run_column_sums(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    matrix, out = draw.normal(rows, columns), draw.normal(columns)
    k.column_sums(matrix, out)
    return (out,)


def run_sum_of_squares(k: Any, draw: Draw, rows: int, columns: int) -> tuple[Array, ...]:
    x = draw.normal(rows * columns * 7)
    return tuple(np.array(k.sum_of_squares(draw.place(x, dtype))) for dtype in FLOATS)


Case = Callable[[Any, Draw, int, int], tuple[Array, ...]]
EXACT: list[Case] = [run_adamw, run_dropout, run_column_sums, run_sum_of_squares]
ROUNDED: list[Case] = [
    *(run_gelu, run_gelu_backward, run_layer_norm, run_layer_norm_backward),
    *(run_causal_softmax, run_causal_softmax_backward, run_cross_entropy),
]
