"""What the fused kernels refuse, in which words, and that nothing has been written then."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernels import fused
from kernels.dtypes import BFLOAT16

Array = np.ndarray[Any, np.dtype[Any]]


def ones(*shape: int, dtype: Any = np.float32) -> Array:
    return np.ones(shape, dtype)


def read_only(*shape: int) -> Array:
    array = ones(*shape)
    array.flags.writeable = False
    return array


MEMORY = ones(33)
UNALIGNED = np.zeros(17, np.uint8)[1:].view(np.float32)
KEY = (1, 2)


def adamw(values: Array, gradients: Array, step: int = 1, copy: Array | None = None) -> None:
    fused.adamw(
        values, gradients, np.zeros_like(values), np.zeros_like(values), 0.1, 0.9, 0.9, 1e-8, 0.1, step, 1.0, copy
    )


def cross_entropy(targets: Any, gradient: Array | None = None) -> None:
    fused.cross_entropy(ones(2, 3), np.asarray(targets), 1.0, ones(2, dtype=np.float64), gradient)


def layer_norm(x: Array, mean: Array, inverse: Array) -> None:
    fused.layer_norm(x, ones(3), ones(3), 1e-5, np.empty_like(x), mean, inverse)


REFUSED: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, r"gelu: x is a list, expected a numpy.ndarray", lambda: fused.gelu([1.0], None, ones(1))),  # type: ignore[arg-type]
    (TypeError, r"gelu: x has dtype int32, expected float32 or float64", lambda: fused.gelu(ones(4, dtype=np.int32), None, ones(4))),
    (TypeError, r"gelu: out has dtype float64, expected float32", lambda: fused.gelu(ones(4), None, ones(4, dtype=np.float64))),
    (ValueError, r"gelu: out has shape \(4,\), expected \(2, 4\)", lambda: fused.gelu(ones(2, 4), None, ones(4))),
    (ValueError, r"gelu: bias has shape \(3,\), expected \(4,\)", lambda: fused.gelu(ones(2, 4), ones(3), ones(2, 4))),
    (ValueError, r"gelu: x has shape \(\), expected at least 1 axes", lambda: fused.gelu(ones(), None, ones())),
    (ValueError, r"gelu: x has strides \(8,\), not contiguous", lambda: fused.gelu(ones(8)[::2], None, ones(4))),
    (ValueError, r"gelu: x begins at 0x[0-9a-f]+, no multiple of 4", lambda: fused.gelu(UNALIGNED, None, ones(4))),
    (ValueError, r"gelu: out is read-only; pass a writable array", lambda: fused.gelu(ones(4), None, read_only(4))),
    (ValueError, r"gelu: out and x overlap in part", lambda: fused.gelu(MEMORY[:32], None, MEMORY[1:])),
    (ValueError, r"gelu: out and bias share memory", lambda: fused.gelu(ones(4), MEMORY[:4], MEMORY[:4])),
    (ValueError, r"gelu_backward: g has shape \(3,\)", lambda: fused.gelu_backward(ones(3), ones(4), None, ones(4))),
    (ValueError, r"layer_norm: mean has shape \(3,\), expected \(2,\)", lambda: layer_norm(ones(2, 3), ones(3), ones(2))),
    (ValueError, r"layer_norm: mean and inverse share memory", lambda: layer_norm(ones(2, 3), MEMORY[:2], MEMORY[:2])),
    (ValueError, r"causal_softmax: scores has shape \(3,\), expected at least 2 axes", lambda: fused.causal_softmax(ones(3), 1.0, 0)),
    (ValueError, r"causal_softmax: scores is read-only", lambda: fused.causal_softmax(read_only(2, 3), 1.0, 0)),
    (ValueError, r"cross_entropy: targets\[1\] is 3, expected 0 to 2", lambda: cross_entropy([0, 3])),
    (ValueError, r"cross_entropy: targets\[0\] is -1, expected 0 to 2", lambda: cross_entropy([-1, 0])),
    (TypeError, r"cross_entropy: targets has dtype int32, expected int64", lambda: cross_entropy(np.zeros(2, np.int32))),
    (ValueError, r"cross_entropy: gradient has shape \(3, 2\), expected \(2, 3\)", lambda: cross_entropy([0, 0], ones(3, 2))),
    (TypeError, r"adamw: gradients has dtype float64, expected float32 or bfloat16 or float16", lambda: adamw(ones(3), ones(3, dtype=np.float64))),
    (TypeError, r"adamw: copy has dtype float32, expected bfloat16 or float16", lambda: adamw(ones(3), ones(3), copy=ones(3))),
    (ValueError, r"adamw: values and gradients share memory", lambda: adamw(MEMORY, MEMORY)),
    (ValueError, r"adamw: step is 0, expected 1 or more", lambda: adamw(ones(3), ones(3), step=0)),
    (TypeError, r"convert: source has dtype int64", lambda: fused.convert(ones(3, dtype=np.int64), ones(3))),
    (ValueError, r"convert: target and source overlap in part", lambda: fused.convert(MEMORY[:8], MEMORY.view(BFLOAT16)[:8])),
    (TypeError, r"sum_of_squares: x has dtype complex64", lambda: fused.sum_of_squares(ones(3, dtype=np.complex64))),
    (ValueError, r"dropout: probability is 1.0, expected 0 <= probability < 1", lambda: fused.dropout(ones(3), 1.0, KEY, 0, None, ones(3))),
    (ValueError, r"dropout: key is \(1,\), expected two words of 64 bits", lambda: fused.dropout(ones(3), 0.5, (1,), 0, None, ones(3))),
    (ValueError, r"dropout: elements -1 \+ i·3 \+ j leave the stream", lambda: fused.dropout(ones(3), 0.5, KEY, -1, None, ones(3))),
    (ValueError, r"column_sums: matrix has shape \(3,\)", lambda: fused.column_sums(ones(3), ones(3))),
    (ValueError, r"column_sums: out has shape \(2,\), expected \(3,\)", lambda: fused.column_sums(ones(2, 3), ones(2))),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), REFUSED, ids=[message[:40] for _, message, _ in REFUSED])
def test_misuse_is_refused(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    before = MEMORY.copy()
    with pytest.raises(error, match=message):
        call()
    np.testing.assert_array_equal(MEMORY, before)


def test_a_wrong_target_leaves_everything_as_it_was() -> None:
    logits, losses = ones(2, 3), np.full(2, 7.0)
    with pytest.raises(ValueError, match=r"targets\[1\]"):
        fused.cross_entropy(logits, np.array([0, 5]), 1.0, losses, logits)
    assert (logits == 1).all()
    assert (losses == 7).all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,)])
def test_nothing_is_done_to_nothing(shape: tuple[int, ...]) -> None:
    x, columns, leading = ones(*shape), ones(*shape[-1:]), ones(*shape[:-1])
    fused.gelu(x, columns, x)
    fused.gelu_backward(x, x.copy(), None, x)
    fused.layer_norm(x, columns, columns, 1e-5, x, leading, leading.copy())
    fused.layer_norm_backward(x, x.copy(), columns, leading, leading, x, columns.copy(), columns.copy())
    fused.dropout(x, 0.5, KEY, 0, None, x)
    fused.convert(x, x.astype(BFLOAT16))
    adamw(x, x.copy())
    assert fused.sum_of_squares(x) == 0
    if x.ndim == 2:
        fused.causal_softmax(x, 1.0, 0)
        fused.causal_softmax_backward(x, x.copy(), 1.0, None, x)
        fused.column_sums(x, columns)
        assert (columns == 1).all()
    fused.cross_entropy(ones(0, 5), np.zeros(0, np.int64), 1.0, np.zeros(0))


def test_axes_in_front_count_as_rows() -> None:
    generator = np.random.default_rng(0)
    x, bias = generator.standard_normal((2, 3, 4)), generator.standard_normal(4)
    nested, flat = np.empty_like(x), np.empty((6, 4))
    fused.gelu(x, bias, nested)
    fused.gelu(x.reshape(6, 4), bias, flat)
    np.testing.assert_array_equal(nested.reshape(6, 4), flat)
    mean, inverse = np.empty((2, 3)), np.empty((2, 3))
    fused.layer_norm(x, bias, bias, 1e-5, nested, mean, inverse)
    np.testing.assert_allclose(mean, x.mean(axis=-1), atol=1e-15)
    scores, masked = x.copy(), x.copy()
    fused.causal_softmax(scores, 1.0, None)
    np.testing.assert_allclose(scores.sum(axis=-1), 1)
    fused.causal_softmax(masked, 1.0, 0)
    np.testing.assert_array_equal(masked == 0, np.broadcast_to(np.triu(np.ones((3, 4)), 1) == 1, (2, 3, 4)))


def test_dropout_forward_and_backward_share_a_mask() -> None:
    x, g = ones(40, 50), ones(40, 50) * 3
    whole, part = np.empty_like(x), np.empty((40, 20), np.float32)
    fused.dropout(x, 0.25, KEY, 5, 50, whole)
    fused.dropout(g, 0.25, KEY, 5, None, g)
    np.testing.assert_array_equal(g, whole * 3)
    fused.dropout(np.ascontiguousarray(x[:, 30:]), 0.25, KEY, 35, 50, part)
    np.testing.assert_array_equal(part, whole[:, 30:])
    fused.dropout(x, 0.0, KEY, 0, None, whole)
    np.testing.assert_array_equal(whole, x)


def test_adamw_takes_its_factors_from_the_step() -> None:
    values, gradients = ones(5), ones(5)
    adamw(values, gradients)
    # The first step is the learning rate, whatever the gradient; a tenth of the value decays at that rate.
    np.testing.assert_allclose(values, 1 - 0.1 - 0.01, rtol=1e-6)
    assert math.isclose(fused.sum_of_squares(gradients), 5)
