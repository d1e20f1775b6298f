"""The fused kernels of every back end against formulas in float64, finite differences and known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import fused, numpy_fused
from tests.kernels.fused_cases import FLOATS, Array, Draw, on_each_backend, on_each_dtype, seeds, shapes, tolerance

# Formulas, written once more in float64 and as plainly as can be.


def gelu_formula(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax_formula(scores: Array, scale: float, offset: int) -> Array:
    result = np.zeros_like(scores)
    for place in np.ndindex(*scores.shape[:-1]):
        visible = max(0, min(scores.shape[-1], place[-1] + offset + 1))
        if visible:
            seen = scores[place][:visible] * scale
            result[place][:visible] = np.exp(seen - seen.max()) / np.exp(seen - seen.max()).sum()
    return result


def slope_of(function: Callable[[Array], Any], x: Array, g: Array, h: float = 1e-6) -> Array:
    """The gradient of Σ g·function(x), by central differences."""
    result = np.empty_like(x)
    for place in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[place] = h
        result[place] = ((function(x + step) - function(x - step)) * g).sum() / (2 * h)
    return result


@on_each_backend
@on_each_dtype
@given(shape=shapes, seed=seeds)
def test_gelu_is_the_formula(backend: Any, dtype: Any, shape: tuple[int, int], seed: int) -> None:
    draw = Draw(seed, dtype)
    x, bias = draw.normal(*shape, scale=3), draw.normal(shape[1])
    for shift in (bias, None):
        out = np.empty_like(x)
        backend.gelu(x, shift, out)
        expected = gelu_formula((x if shift is None else x + shift).astype(np.float64))
        np.testing.assert_allclose(out, expected, rtol=tolerance(dtype), atol=tolerance(dtype) / 4)


@on_each_backend
def test_gelu_backward_is_the_slope(backend: Any) -> None:
    draw = Draw(1, np.float64)
    x, bias, g = draw.normal(3, 17, scale=2), draw.normal(17), draw.normal(3, 17)
    out = np.empty_like(x)
    backend.gelu_backward(g, x, bias, out)
    np.testing.assert_allclose(out, slope_of(lambda v: gelu_formula(v + bias), x, g), atol=1e-8)


@on_each_backend
@on_each_dtype
def test_gelu_at_the_ends(backend: Any, dtype: Any) -> None:
    huge = float(np.finfo(dtype).max)
    x = np.array([[math.inf, -math.inf, huge, -huge, math.nan, 0.0, 40.0, -40.0, 31.0, -31.0]], dtype)
    out, slope, g = np.empty_like(x), np.empty_like(x), np.ones_like(x)
    with np.errstate(over="ignore"):
        backend.gelu(x, None, out)
        backend.gelu_backward(g, x, None, slope)
    np.testing.assert_array_equal(out[0], [math.inf, 0, huge, 0, math.nan, 0, 40, 0, 31, 0])
    np.testing.assert_array_equal(slope[0], [1, 0, 1, 0, math.nan, 0.5, 1, 0, 1, 0])


@on_each_backend
@on_each_dtype
@given(shape=shapes, seed=seeds, centre=st.sampled_from([0.0, 3.0, -50.0]))
def test_layer_norm_is_the_formula(backend: Any, dtype: Any, shape: tuple[int, int], seed: int, centre: float) -> None:
    draw = Draw(seed, dtype)
    x, weight, bias = draw.normal(*shape) + dtype(centre), draw.normal(shape[1]), draw.normal(shape[1])
    out, mean, inverse = np.empty_like(x), np.empty(shape[0], dtype), np.empty(shape[0], dtype)
    backend.layer_norm(x, weight, bias, 1e-5, out, mean, inverse)
    exact = x.astype(np.float64)
    factor = 1 / np.sqrt(exact.var(axis=1) + 1e-5)
    # What the mean loses to rounding is magnified by the inverse deviation.
    limit = tolerance(dtype) * (1 + abs(centre)) * max(1.0, factor.max())
    np.testing.assert_allclose(mean, exact.mean(axis=1), atol=tolerance(dtype) * (1 + abs(centre)))
    np.testing.assert_allclose(inverse, factor, rtol=limit * factor.max())
    expected = (exact - exact.mean(axis=1, keepdims=True)) * factor[:, None] * weight + bias
    np.testing.assert_allclose(out, expected, atol=limit * factor.max() * 4)


@on_each_backend
def test_layer_norm_backward_is_the_slope(backend: Any) -> None:
    draw = Draw(2, np.float64)
    x, weight, bias, g = draw.normal(3, 19), draw.normal(19), draw.normal(19), draw.normal(3, 19)
    out, mean, inverse = np.empty_like(x), np.empty(3), np.empty(3)

    def function(x: Array, weight: Array, bias: Array) -> Array:
        result = np.empty_like(x)
        backend.layer_norm(x, weight, bias, 1e-5, result, mean, inverse)
        return result

    expected = [
        slope_of(lambda v: function(v, weight, bias), x, g),
        slope_of(lambda v: function(x, v, bias), weight, g),
        slope_of(lambda v: function(x, weight, v), bias, g),
    ]
    function(x, weight, bias)
    of_weight, of_bias = np.full(19, 10.0), np.full(19, -10.0)
    backend.layer_norm_backward(g, x, weight, mean, inverse, out, of_weight, of_bias)
    for actual, wanted in zip((out, of_weight - 10, of_bias + 10), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=1e-7)


@on_each_backend
@on_each_dtype
@given(queries=st.integers(1, 9), keys=st.integers(1, 90), offset=st.integers(-12, 95), seed=seeds)
def test_causal_softmax_is_the_formula(
    backend: Any, dtype: Any, queries: int, keys: int, offset: int, seed: int
) -> None:
    scores = Draw(seed, dtype).normal(2, queries, keys, scale=10)
    expected = softmax_formula(scores.astype(np.float64), 0.3, offset)
    backend.causal_softmax(scores, 0.3, offset)
    np.testing.assert_allclose(scores, expected, rtol=tolerance(dtype), atol=float(np.finfo(dtype).tiny))
    assert not scores[expected == 0].any()


@on_each_backend
def test_causal_softmax_backward_is_the_slope(backend: Any) -> None:
    draw = Draw(3, np.float64)
    scores, g = draw.normal(2, 4, 6), draw.normal(2, 4, 6)
    weights, out = softmax_formula(scores, 0.7, -1), np.empty_like(g)
    expected = slope_of(lambda v: softmax_formula(v, 0.7, -1), scores, g)
    g[:, weights[0] == 0] = math.nan
    backend.causal_softmax_backward(g, weights, 0.7, -1, out)
    np.testing.assert_allclose(out, expected, atol=1e-8)


@on_each_backend
@on_each_dtype
def test_softmax_of_unusual_rows(backend: Any, dtype: Any) -> None:
    inf, nan, huge = math.inf, math.nan, float(np.finfo(dtype).max) / 4
    rows = [[huge, 0, 0], [huge, huge, -huge], [-huge, -huge, -inf], [1, -inf, 1], [inf, 0, 0], [nan, 0, 0], [-inf] * 3]
    scores = np.array(rows, dtype)[:, None]
    backend.causal_softmax(scores, 1.0, 3)
    expected = [[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [nan] * 3, [nan] * 3, [nan] * 3]
    np.testing.assert_array_equal(scores[:, 0], np.array(expected, dtype))
    masked = np.full((1, 2, 40), nan, dtype)
    masked[0, 1, 0] = 5
    backend.causal_softmax(masked, 1.0, -1)
    assert not masked[0, 0].any()
    assert masked[0, 1, 0] == 1
    assert not masked[0, 1, 1:].any()


@on_each_backend
@on_each_dtype
@given(shape=shapes, seed=seeds)
def test_cross_entropy_is_the_formula(backend: Any, dtype: Any, shape: tuple[int, int], seed: int) -> None:
    draw = Draw(seed, dtype)
    logits, targets = draw.normal(*shape, scale=5), draw.generator.integers(0, shape[1], shape[0])
    losses, only_losses, gradient = np.empty(shape[0]), np.empty(shape[0]), np.empty_like(logits)
    backend.cross_entropy(logits, targets, 0.25, losses, gradient)
    backend.cross_entropy(logits, targets, 0.25, only_losses, None)
    exact = logits.astype(np.float64)
    softmax = softmax_formula(exact, 1.0, shape[1])
    one_hot = np.arange(shape[1]) == targets[:, None]
    np.testing.assert_allclose(gradient, 0.25 * (softmax - one_hot), atol=tolerance(dtype))
    expected = np.log(np.exp(exact).sum(axis=1)) - exact[one_hot]
    np.testing.assert_allclose(losses, expected, atol=tolerance(dtype), rtol=tolerance(dtype))
    assert losses.tobytes() == only_losses.tobytes()


@on_each_backend
@on_each_dtype
def test_cross_entropy_of_unusual_rows(backend: Any, dtype: Any) -> None:
    logits = np.array([[1000, -1000, 0], [-math.inf, 0, 0], [math.nan, 0, 0], [1e30, 1e30, -1e30]], dtype)
    losses, gradient = np.empty(4), np.empty_like(logits)
    backend.cross_entropy(logits, np.array([1, 1, 1, 2]), 1.0, losses, gradient)
    np.testing.assert_allclose(losses[:3], [2000, math.log(2), math.nan])
    assert losses[3] == pytest.approx(2e30)
    np.testing.assert_array_equal(gradient[1], [0, -0.5, 0.5])
    assert np.isnan(gradient[2]).all()


@on_each_backend
@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
@given(count=st.integers(1, 70), seed=seeds)
def test_conversion_has_the_bits_of_astype(
    backend: Any, source: np.dtype[Any], target: np.dtype[Any], count: int, seed: int
) -> None:
    draw = Draw(seed, source)
    limits = ml_dtypes.finfo(np.float16)
    special = np.array([0.0, -0.0, math.inf, -math.inf, 65504, 65519.99, 65520, float(limits.smallest_subnormal) / 2])
    exponents = draw.generator.integers(-150, 140, count)
    mantissas = draw.generator.integers(1 << 12, 1 << 13, count) / 4096 + draw.generator.choice(
        [0, 2.0**-40, -(2.0**-40)], count
    )
    with np.errstate(over="ignore"):
        values = draw.place(
            np.concatenate([special, mantissas * 2.0 ** (exponents % 40 - 30), np.ldexp(mantissas, exponents)])
        )
        expected = values.astype(target)
    actual = draw.place(np.zeros(values.size), target)
    backend.convert(values, actual)
    assert actual.tobytes() == expected.tobytes()
    backend.convert(np.full(3, math.nan, source), actual[:3])
    assert np.isnan(actual[:3].astype(np.float64)).all()


@on_each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sum_of_squares_is_close_to_the_exact_sum(backend: Any, dtype: np.dtype[Any]) -> None:
    x = Draw(5, dtype).normal(10_007)
    assert backend.sum_of_squares(x) == pytest.approx(math.fsum(x.astype(np.float64) ** 2), rel=1e-14)


@on_each_backend
def test_adamw_is_the_paper(backend: Any) -> None:
    draw = Draw(6, np.float64)
    values, gradients = draw.normal(50), draw.normal(50)
    first, second, expected = np.zeros(50), np.zeros(50), values.copy()
    m, v = np.zeros(50), np.zeros(50)
    for t in range(1, 4):
        step = fused.AdamWStep(0.9, 0.99, 1e-8, 1 - 0.01 * 0.1, 0.01 / (1 - 0.9**t), 1 / math.sqrt(1 - 0.99**t), 0.5)
        backend.adamw(values, gradients, first, second, step, None)
        m, v = 0.9 * m + 0.1 * (gradients / 2), 0.99 * v + 0.01 * (gradients / 2) ** 2
        expected = expected - 0.01 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.1 * expected)
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_dropout_words_are_philox() -> None:
    # The known answers that the generator's authors give: all zeros, and the digits of pi.
    zeros = numpy_fused.dropout_words((0, 0), 0, 64).reshape(4, 16)
    assert [hex(word) for word in zeros[:, 0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    counter, key = 0x03707344_13198A2E_85A308D3_243F6A88, 0x299F31D0_A4093822
    block, second_word = counter & 0xFFFFFFFF_FFFFFFFF, counter >> 64
    digits = numpy_fused.dropout_words((key, second_word), block // 16 * 64, 64).reshape(4, 16)
    assert [hex(word) for word in digits[:, block % 16]] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


@on_each_backend
@on_each_dtype
@given(
    shape=shapes, cut=st.integers(0, 150), first=st.one_of(st.integers(0, 300), st.integers(2**36, 2**63)), seed=seeds
)
def test_dropout_depends_on_the_index_alone(
    backend: Any, dtype: Any, shape: tuple[int, int], cut: int, first: int, seed: int
) -> None:
    rows, columns = shape
    cut %= columns
    x = Draw(seed, dtype).normal(rows, columns)
    stream = fused.DropoutStream((seed, 9), first, columns, 1 << 31, 2.0)
    whole, flat, right = np.empty_like(x), np.empty((1, x.size), dtype), np.empty((rows, columns - cut), dtype)
    backend.dropout(x, stream, whole)
    backend.dropout(x.reshape(1, -1), stream, flat)
    backend.dropout(np.ascontiguousarray(x[:, cut:]), stream._replace(first=first + cut), right)
    assert whole.tobytes() == flat.tobytes()
    assert whole[:, cut:].tobytes() == right.tobytes()
    assert set(np.unique(whole / x)) <= {0.0, 2.0}


@on_each_backend
def test_dropout_keeps_its_share(backend: Any) -> None:
    x, out = np.ones((1, 100_000)), np.empty((1, 100_000))
    x[0, :1000] = math.inf
    backend.dropout(x, fused.DropoutStream((1, 2), 0, 0, round(0.2 * 2**32), 1.25), out)
    assert np.count_nonzero(out) == pytest.approx(80_000, abs=500)
    assert set(np.unique(out)) == {0.0, 1.25, math.inf}
