"""The reference of the fused kernels, in numpy: serves where the native code is not built.

Element by element (AdamW, dropout, conversion, column sums) and in the sum of squares, native kernels agree with it
bit for bit; where exponentials or sums over rows come in, to rounding. All arguments have been checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kernels.fused import AdamWStep, DropoutStream

Array = np.ndarray[Any, np.dtype[Any]]

_SLOPE, _CUBIC = 0.79788456080286535588, 0.044715
_SATURATED = 32.0
_SQUARE_LANES = 16
_BLOCK = 1 << 16


def _gelu_parts(x: Array, bias: Array | None) -> tuple[Array, Array, Array, Array]:
    """Return z (not below −32), z² and, with h = (1 + tanh)/2, h and h·(1 − h); after Hendrycks 2016."""
    z = np.maximum(x if bias is None else x + bias, -_SATURATED)
    inner = np.minimum(z, _SATURATED)
    square = inner * inner
    twice_u = inner * (square * (2 * _SLOPE * _CUBIC) + 2 * _SLOPE)
    small = np.exp(-np.abs(twice_u))
    larger = 1 / (small + 1)
    smaller = small * larger
    return z, square, np.where(twice_u < 0, smaller, larger), smaller * larger


def gelu(x: Array, bias: Array | None, out: Array) -> None:
    """Set `out` to gelu(x + bias)."""
    z, _, share, _ = _gelu_parts(x, bias)
    np.multiply(z, share, out=out)


def gelu_backward(g: Array, x: Array, bias: Array | None, out: Array) -> None:
    """Set `out` to g·gelu′(x + bias)."""
    z, square, share, spread = _gelu_parts(x, bias)
    inner = np.minimum(z, _SATURATED)
    derivative = share + inner * spread * (square * (6 * _SLOPE * _CUBIC) + 2 * _SLOPE)
    np.multiply(g, derivative, out=out)


def layer_norm(x: Array, weight: Array, bias: Array, epsilon: float, out: Array, mean: Array, inverse: Array) -> None:
    """Set `out` to the normalised rows of x times weight plus bias, and the rows' means and 1/deviations."""
    mean[:] = x.mean(axis=1)
    distance = x - mean[:, None]
    inverse[:] = 1 / np.sqrt((distance * distance).mean(axis=1) + x.dtype.type(epsilon))
    distance *= inverse[:, None]
    distance *= weight
    np.add(distance, bias, out=out)


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
    """Set `out` to the gradient of x, and add to those of weight and bias."""
    normalised = (x - mean[:, None]) * inverse[:, None]
    scaled = g * weight
    column_sums(g * normalised, weight_gradient)
    column_sums(g, bias_gradient)
    along = (scaled * normalised).mean(axis=1, keepdims=True)
    scaled -= normalised * along + scaled.mean(axis=1, keepdims=True)
    np.multiply(scaled, inverse[:, None], out=out)


def _visible(scores: Array, offset: int) -> Array:
    _, queries, keys = scores.shape
    return np.arange(keys) <= np.arange(queries)[:, None] + offset


def causal_softmax(scores: Array, scale: float, offset: int) -> None:
    """Replace (N, queries, keys) scores by softmax(scale·scores) over the visible keys; the others become 0."""
    visible = _visible(scores, offset)
    scores *= scores.dtype.type(scale)
    highest = scores.max(axis=-1, keepdims=True, where=visible, initial=-np.inf)
    # What is masked counts for nothing, whatever it is.
    highest[:, ~visible.any(axis=-1)] = 0
    with np.errstate(invalid="ignore", divide="ignore"):
        scores -= highest
        scores[:, ~visible] = -np.inf
        np.exp(scores, out=scores)
        scores *= 1 / scores.sum(axis=-1, keepdims=True)
    scores[:, ~visible] = 0


def causal_softmax_backward(g: Array, weights: Array, scale: float, offset: int, out: Array) -> None:
    """Set `out` to scale·w·(g − Σ g·w), and to 0 where a key is masked."""
    visible = _visible(g, offset)
    along = np.multiply(g, weights, where=visible, out=np.zeros_like(g)).sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        np.multiply((g - along) * weights, g.dtype.type(scale), out=out)
    out[:, ~visible] = 0


def cross_entropy(logits: Array, targets: Array, scale: float, losses: Array, gradient: Array | None) -> None:
    """Set losses to −log softmax(logits)[target], and the gradient to scale·(softmax − one-hot)."""
    rows = np.arange(len(targets))
    highest = logits.max(axis=1, keepdims=True)
    chosen = logits[rows, targets].astype(np.float64) - highest[:, 0]
    with np.errstate(invalid="ignore"):
        exponentials = np.exp(np.subtract(logits, highest, out=gradient), out=gradient)
    sums = exponentials.sum(axis=1, keepdims=True)
    losses[:] = np.log(sums[:, 0].astype(np.float64)) - chosen
    if gradient is not None:
        gradient *= gradient.dtype.type(scale) / sums
        gradient[rows, targets] -= gradient.dtype.type(scale)


def adamw(values: Array, gradients: Array, first: Array, second: Array, step: AdamWStep, copy: Array | None) -> None:
    """Update values and moments in place; set `copy` to the new values, rounded."""
    for start in range(0, values.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        value, m, v = values[block], first[block], second[block]
        g = gradients[block].astype(values.dtype)
        g *= step.gradient_scale
        m *= step.beta1
        m += g * (1 - step.beta1)
        v *= step.beta2
        v += g * g * (1 - step.beta2)
        value *= step.decay
        value -= m / (np.sqrt(v) * step.second_correction + step.epsilon) * step.rate
        if copy is not None:
            convert(value, copy[block])


def convert(source: Array, target: Array) -> None:
    """Set `target` to the source, rounded to nearest even."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        target[:] = source.astype(target.dtype)


def sum_of_squares(x: Array) -> float:
    """Return Σ x² in float64: sixteen lanes, each summed in order, then folded by halves."""
    lanes = np.zeros(_SQUARE_LANES)
    for start in range(0, x.size, _BLOCK):
        squares = np.square(x[start : start + _BLOCK].astype(np.float64))
        padded = np.append(squares, np.zeros(-squares.size % _SQUARE_LANES))
        lanes = np.add.reduce(np.vstack([lanes, padded.reshape(-1, _SQUARE_LANES)]), axis=0)
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return float(lanes[0])


def column_sums(matrix: Array, out: Array) -> None:
    """Add the rows to `out`, from first to last."""
    for row in matrix:
        out += row


def dropout(x: Array, stream: DropoutStream, out: Array) -> None:
    """Set `out` to x·scale where the element's word reaches the threshold, and to 0 elsewhere."""
    columns = x.shape[1]
    for row in range(len(x)):
        begin = stream.first + row * stream.row_stride
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            kept = dropout_words(stream.key, begin + start, stop - start) >= np.uint32(stream.threshold)
            block = x[row, start:stop]
            with np.errstate(invalid="ignore", over="ignore"):
                out[row, start:stop] = np.where(kept, block * x.dtype.type(stream.scale), x.dtype.type(0))


def dropout_words(key: tuple[int, int], start: int, count: int) -> Array:
    """Return the 32-bit words of the elements from `start` on, by Philox-4x32-10 (Salmon et al. 2011).

    The generator's key is the first word of `key`, the second one the upper half of its counter. Element e has word
    e // 16 % 4 of block 16·(e // 64) + e % 16.
    """
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    groups = np.arange(start // 64, (start + count + 63) // 64, dtype=np.uint64)
    blocks: Array = groups[:, None] * np.uint64(16) + np.arange(16, dtype=np.uint64)
    counter = [
        blocks & low,
        blocks >> half,
        np.full_like(blocks, key[1] & 0xFFFFFFFF),
        np.full_like(blocks, key[1] >> 32),
    ]
    key0, key1 = key[0] & 0xFFFFFFFF, key[0] >> 32
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> half) ^ counter[1] ^ np.uint64(key0),
            second & low,
            (first >> half) ^ counter[3] ^ np.uint64(key1),
            first & low,
        ]
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    words: Array = np.stack(counter, axis=1).astype(np.uint32).reshape(-1)
    return words[start % 64 :][:count]
