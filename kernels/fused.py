"""Fused kernels for training: each passes over memory once, in place where one asks for it.

Arrays are C-contiguous, float32 or float64, all of one dtype, and all numpy or all cupy arrays; numpy arrays are
served by the native code, or by numpy where it is not built. `rows` below means all leading axes together, `columns`
the last one. The bits of a row depend on that row alone, not on how many are given, and native kernels give the same
bits on every instruction set. Sums over a row are in the dtype of the array, over 32 (float32) or 16 (float64) lanes;
exponentials are within 2 units in the last place.

Every function raises TypeError for a wrong dtype or kind of array, and ValueError for a wrong shape, for arrays that
are not contiguous, aligned or writable, and for ones that overlap, before anything is written.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kernels import native_backend, numpy_fused
from kernels.dtypes import BFLOAT16
from kernels.fused_checks import COMPUTED, FLOAT16, FLOAT64, INT64, STORED, Checks

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, np.dtype[Any]]

_native = native_backend.load()
_host: Any = numpy_fused if _native is None else _native.fused


class AdamWStep(NamedTuple):
    """The factors of one AdamW step that are the same for all elements."""

    beta1: float
    beta2: float
    epsilon: float
    decay: float
    rate: float
    second_correction: float
    gradient_scale: float


class DropoutStream(NamedTuple):
    """Which random words a dropout draws, and from which word on it keeps an element."""

    key: tuple[int, int]
    first: int
    row_stride: int
    threshold: int
    scale: float


def gelu(x: Array, bias: Array | None, out: Array) -> None:
    """Set `out` to gelu(x + bias), in its tanh form (Hendrycks 2016, arXiv 1606.08415).

    `bias` has the shape of the last axis, or is None; `out` may be `x`.
    """
    checks = Checks("gelu", x=x, bias=bias, out=out)
    _check_gelu(checks, x)
    checks.apart("out", "x")
    if x.size:
        _backend(checks).gelu(_rows(x), bias, _rows(out))


def gelu_backward(g: Array, x: Array, bias: Array | None, out: Array) -> None:
    """Set `out` to the gradient with respect to x, where g is that of gelu(x + bias); `out` may be `g` or `x`."""
    checks = Checks("gelu_backward", x=x, g=g, bias=bias, out=out)
    _check_gelu(checks, x)
    checks.apart("out", "g", "x")
    if x.size:
        _backend(checks).gelu_backward(_rows(g), _rows(x), bias, _rows(out))


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float, out: Array, mean: Array, inverse: Array) -> None:
    """Set `out` to (x − mean)·inverse·weight + bias, where inverse = 1/√(variance + epsilon), over the last axis.

    `weight` and `bias` have the shape of the last axis, `mean` and `inverse`, which are set too, that of the leading
    ones; `out` may be `x`. (Ba 2016, arXiv 1607.06450)
    """
    checks = Checks("layer_norm", x=x, weight=weight, bias=bias, out=out, mean=mean, inverse=inverse)
    _check_layer_norm(checks, x)
    checks.layout("out", "mean", "inverse")
    checks.apart("out", "x")
    checks.apart("mean")
    checks.apart("inverse")
    if x.size:
        _backend(checks).layer_norm(_rows(x), weight, bias, epsilon, _rows(out), mean.reshape(-1), inverse.reshape(-1))


def layer_norm_backward(
    g: Array,
    x: Array,
    weight: Array,
    mean: Array,
    inverse: Array,
    out: Array,
    weight_gradient: Array,
    bias_gradient: Array,
) -> None:
    """Set `out` to the gradient with respect to x, where g is that of `layer_norm`, which set mean and inverse.

    The gradients of weight and bias are added to what the arrays hold, row after row. `out` may be `g` or `x`.
    """
    gradients = {"weight_gradient": weight_gradient, "bias_gradient": bias_gradient}
    checks = Checks("layer_norm_backward", x=x, g=g, weight=weight, mean=mean, inverse=inverse, out=out, **gradients)
    _check_layer_norm(checks, x)
    checks.layout("out", *gradients)
    checks.apart("out", "g", "x")
    for name in gradients:
        checks.apart(name)
    if x.size:
        _backend(checks).layer_norm_backward(
            *(_rows(g), _rows(x), weight, mean.reshape(-1), inverse.reshape(-1), _rows(out)),
            *(weight_gradient, bias_gradient),
        )


def causal_softmax(scores: Array, scale: float, offset: int | None) -> None:
    """Replace `scores` (…, queries, keys) by softmax(scale·scores) over the last axis, of the keys that are seen.

    Query i sees the keys j <= i + offset; with None it sees all. Keys that are not seen become exactly 0, whatever
    they held; a query that sees none has zeros only. A row that holds +∞ or NaN, or nothing but −∞, becomes NaN.
    """
    checks = Checks("causal_softmax", scores=scores)
    _check_scores(checks, scores, "scores")
    checks.layout("scores")
    if scores.size:
        _backend(checks).causal_softmax(_matrices(scores), scale, _offset(offset, scores))


def causal_softmax_backward(g: Array, weights: Array, scale: float, offset: int | None, out: Array) -> None:
    """Set `out` to scale·weights·(g − Σ g·weights), where g is the gradient of what `causal_softmax` made.

    Where a key is not seen, `out` is 0, whatever g holds there; `out` may be `g` or `weights`.
    """
    checks = Checks("causal_softmax_backward", weights=weights, g=g, out=out)
    _check_scores(checks, weights, "weights")
    checks.same("g", "out", dtype=weights.dtype, shape=weights.shape)
    checks.layout("out")
    checks.apart("out", "g", "weights")
    if g.size:
        _backend(checks).causal_softmax_backward(
            _matrices(g), _matrices(weights), scale, _offset(offset, g), _matrices(out)
        )


def cross_entropy(logits: Array, targets: Array, scale: float, losses: Array, gradient: Array | None = None) -> None:
    """Set losses[n] to −log softmax(logits[n])[targets[n]], and `gradient` to scale·(softmax − one-hot).

    `logits` is (N, V), `targets` (N,) of int64, `losses` (N,) of float64; `gradient` is None, has the shape of
    `logits`, or is `logits`. Raises ValueError for a target outside of 0 … V − 1.
    """
    checks = Checks("cross_entropy", logits=logits, targets=targets, losses=losses, gradient=gradient)
    checks.dtype("logits", COMPUTED)
    if logits.ndim != 2:
        raise ValueError(f"cross_entropy: logits has shape {logits.shape}, expected (N, V)")
    rows, columns = logits.shape
    checks.same("targets", dtype=INT64, shape=(rows,))
    checks.same("losses", dtype=FLOAT64, shape=(rows,))
    checks.same("gradient", dtype=logits.dtype, shape=logits.shape)
    checks.layout("losses", "gradient")
    checks.apart("losses")
    checks.apart("gradient", "logits")
    wrong = (targets < 0) | (targets >= columns)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(f"cross_entropy: targets[{row}] is {int(targets[row])}, expected 0 to {columns - 1}")
    if rows:
        _backend(checks).cross_entropy(logits, targets, scale, losses, gradient)


def adamw(
    values: Array,
    gradients: Array,
    first: Array,
    second: Array,
    learning_rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    gradient_scale: float,
    copy: Array | None = None,
) -> None:
    """Update `values` and both moments in place by step number `step` (1 is the first) of AdamW.

    Weight decay is decoupled and moments are bias-corrected (Loshchilov 2019, arXiv 1711.05101). `gradients`, which
    are multiplied by `gradient_scale` first, have the dtype of the values, or are bfloat16 or float16; `copy`,
    bfloat16 or float16, gets the new values, rounded. All arrays have one shape.
    """
    checks = Checks("adamw", values=values, gradients=gradients, first=first, second=second, copy=copy)
    checks.dtype("values", COMPUTED)
    checks.dtype("gradients", (values.dtype, BFLOAT16, FLOAT16))
    checks.dtype("copy", (BFLOAT16, FLOAT16))
    for name in ("gradients", "copy"):
        if name in checks.arrays:
            checks.same(name, dtype=checks.arrays[name].dtype, shape=values.shape)
    checks.same("first", "second", dtype=values.dtype, shape=values.shape)
    checks.layout("values", "first", "second", "copy")
    for name in ("values", "first", "second", "copy"):
        checks.apart(name)
    if step < 1:
        raise ValueError(f"adamw: step is {step}, expected 1 or more")
    factors = AdamWStep(
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        decay=1 - learning_rate * weight_decay,
        rate=learning_rate / (1 - beta1**step),
        second_correction=1 / math.sqrt(1 - beta2**step),
        gradient_scale=gradient_scale,
    )
    if values.size:
        flat = (array.reshape(-1) for array in (values, gradients, first, second))
        _backend(checks).adamw(*flat, factors, None if copy is None else copy.reshape(-1))


def convert(source: Array, target: Array) -> None:
    """Set `target` to the source, rounded to nearest even, between float32, float64, bfloat16 and float16.

    The bits are those of `astype`: float64 goes to bfloat16 by way of float32. The arrays have one shape, and share
    no memory, or all of it.
    """
    checks = Checks("convert", source=source, target=target)
    checks.dtype("source", STORED)
    checks.dtype("target", STORED)
    checks.same("target", dtype=target.dtype, shape=source.shape)
    checks.layout("target")
    checks.apart("target", "source")
    if source.size:
        _backend(checks).convert(source.reshape(-1), target.reshape(-1))


def sum_of_squares(x: Array) -> float:
    """Return Σ x², summed in float64 over sixteen lanes; x is float32, float64, bfloat16 or float16.

    The bits are the same from numpy and from every instruction set.
    """
    checks = Checks("sum_of_squares", x=x)
    checks.dtype("x", STORED)
    checks.layout()
    return float(_backend(checks).sum_of_squares(x.reshape(-1))) if x.size else 0.0


def dropout(x: Array, probability: float, key: Sequence[int], first: int, row_stride: int | None, out: Array) -> None:
    """Set `out` to x/(1 − probability) where an element is kept and to 0 elsewhere; `out` may be `x`.

    Element (i, j) of x, seen as (rows, columns), is kept or not by number first + i·row_stride + j of the random
    stream that belongs to `key` (two 64-bit words), and by nothing else: the gradient goes the same way in a second
    call, and a part of an array is treated as it would be in the whole. A `row_stride` of None is `columns`. The
    probability counts in units of 2⁻³². Native kernels, numpy and cupy draw the same words.
    """
    checks = Checks("dropout", x=x, out=out)
    checks.dtype("x", COMPUTED)
    checks.same("out", dtype=x.dtype, shape=x.shape)
    checks.layout("out")
    checks.apart("out", "x")
    if not 0 <= probability < 1:
        raise ValueError(f"dropout: probability is {probability}, expected 0 <= probability < 1")
    if len(key) != 2 or not all(0 <= word < 1 << 64 for word in key):
        raise ValueError(f"dropout: key is {key!r}, expected two words of 64 bits")
    columns = x.shape[-1] if x.ndim else 1
    stride = columns if row_stride is None else row_stride
    rows = x.size // columns if columns else 0
    if first < 0 or stride < 0 or first + rows * stride + columns > 1 << 64:
        raise ValueError(f"dropout: elements {first} + i·{stride} + j leave the stream of 2**64")
    threshold = min(round(probability * 2**32), 2**32 - 1)
    stream = DropoutStream((int(key[0]), int(key[1])), first, stride, threshold, 1 / (1 - probability))
    if x.size:
        shape = (1, x.size) if stride == columns else (-1, columns)
        _backend(checks).dropout(x.reshape(shape), stream, out.reshape(shape))


def column_sums(matrix: Array, out: Array) -> None:
    """Add the rows of `matrix` (rows, columns) to `out` (columns,), from first to last."""
    checks = Checks("column_sums", matrix=matrix, out=out)
    checks.dtype("matrix", COMPUTED)
    if matrix.ndim != 2:
        raise ValueError(f"column_sums: matrix has shape {matrix.shape}, expected (rows, columns)")
    checks.same("out", dtype=matrix.dtype, shape=matrix.shape[1:])
    checks.layout("out")
    checks.apart("out")
    if matrix.size:
        _backend(checks).column_sums(matrix, out)


def _backend(checks: Checks) -> Any:
    if checks.on_device:
        from kernels import cupy_backend

        return cupy_backend
    return _host


def _rows(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def _matrices(array: Array) -> Array:
    return array.reshape(-1, *array.shape[-2:])


def _offset(offset: int | None, scores: Array) -> int:
    """Every query sees all keys if the first one does."""
    return int(scores.shape[-1]) if offset is None else offset


def _check_gelu(checks: Checks, x: Array) -> None:
    _check_axes(checks, x, "x", 1)
    checks.same("g", "out", dtype=x.dtype, shape=x.shape)
    checks.same("bias", dtype=x.dtype, shape=x.shape[-1:])
    checks.layout("out")


def _check_layer_norm(checks: Checks, x: Array) -> None:
    _check_axes(checks, x, "x", 1)
    checks.same("g", "out", dtype=x.dtype, shape=x.shape)
    checks.same("weight", "bias", "weight_gradient", "bias_gradient", dtype=x.dtype, shape=x.shape[-1:])
    checks.same("mean", "inverse", dtype=x.dtype, shape=x.shape[:-1])


def _check_scores(checks: Checks, array: Array, name: str) -> None:
    _check_axes(checks, array, name, 2)


def _check_axes(checks: Checks, array: Array, name: str, axes: int) -> None:
    checks.dtype(name, COMPUTED)
    if array.ndim < axes:
        raise ValueError(f"{checks.operation}: {name} has shape {array.shape}, expected at least {axes} axes")
