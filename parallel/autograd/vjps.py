"""The one table of differentiable operations: a row is a forward function and its vector-Jacobian products.

Rows are as coarse as a transformer's parts, so that each pass over memory is a deliberate one. Notation in
the comments: N tokens (all leading axes flattened), B sequences, S positions, D width, H heads, E = D/H, V
vocabulary; g is the gradient of the row's result. To add an operation write its functions, add its row to
TABLE, and a case to the table's test.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.autograd.tensor import Array, Operation, Saved, array_module

if TYPE_CHECKING:
    from collections.abc import Iterator

_GELU_SLOPE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715
_ONE_HOT_LIMIT = 1024
_CACHED_ELEMENTS = 1 << 15


def _flat(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def _sum_rows(matrix: Array) -> Array:
    """Column sums by a matrix-vector product, several times as fast as a reduction over the first axis."""
    return array_module(matrix).ones(len(matrix), matrix.dtype) @ matrix


def _mean_columns(matrix: Array) -> Array:
    width = matrix.shape[1]
    return matrix @ array_module(matrix).full((width, 1), 1 / width, matrix.dtype)


def _blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield arrays of one shape in matching flat blocks that fit a core's cache; on a device, whole.

    The blocks of a contiguous array are views of it, those of any other are copies.
    """
    flat = [array.reshape(-1) for array in arrays]
    step = _CACHED_ELEMENTS if array_module(flat[0]) is np else max(1, flat[0].size)
    for start in range(0, flat[0].size, step):
        yield tuple(array[start : start + step] for array in flat)


# add: left + right, where right may lack leading axes (the positions, shared by all sequences)


def _add(left: Array, right: Array) -> tuple[Array, Saved]:
    if left.shape[left.ndim - right.ndim :] != right.shape:
        raise ValueError(f"add: the second operand's shape {right.shape} is no ending of the first's, {left.shape}")
    return left + right, (right.shape,)


def _add_left(g: Array, _saved: Saved) -> Array:
    return g


def _add_right(g: Array, saved: Saved) -> Array:
    (shape,) = saved
    return g if g.shape == shape else _sum_rows(g.reshape(-1, math.prod(shape))).reshape(shape)


# linear: x (…, I) times the transposed weight (O, I), plus bias (O,)


def _linear(x: Array, weight: Array, bias: Array) -> tuple[Array, Saved]:
    flat = _flat(x)
    result = flat @ weight.T
    result += bias
    return result.reshape(*x.shape[:-1], len(weight)), (flat, weight, x.shape)


def _linear_x(g: Array, saved: Saved) -> Array:
    _, weight, shape = saved
    return (_flat(g) @ weight).reshape(shape)


def _linear_weight(g: Array, saved: Saved) -> Array:
    flat, _, _ = saved
    return _flat(g).T @ flat


def _linear_bias(g: Array, _saved: Saved) -> Array:
    return _sum_rows(_flat(g))


# project: linear without a bias (the output head)


def _project(x: Array, weight: Array) -> tuple[Array, Saved]:
    flat = _flat(x)
    return (flat @ weight.T).reshape(*x.shape[:-1], len(weight)), (flat, weight, x.shape)


# embedding: rows of the table (V, D) for an integer array of tokens


def _embedding(table: Array, tokens: Array) -> tuple[Array, Saved]:
    return table[tokens], (table.shape, tokens)


def _embedding_table(g: Array, saved: Saved) -> Array:
    (rows, width), tokens = saved
    xp = array_module(g)
    if (
        rows <= _ONE_HOT_LIMIT
    ):  # tokens repeat, and a product with one-hot rows adds them up far quicker than scattering
        one_hot = xp.zeros((tokens.size, rows), g.dtype)
        one_hot[xp.arange(tokens.size), tokens.reshape(-1)] = 1
        return one_hot.T @ g.reshape(-1, width)
    gradient: Array = xp.zeros((rows, width), g.dtype)
    xp.add.at(gradient, tokens.reshape(-1), g.reshape(-1, width))
    return gradient


# layer_norm: over the last axis, then times weight (D,) plus bias (D,)  (Ba 2016, arXiv 1607.06450)


def _layer_norm(x: Array, weight: Array, bias: Array, epsilon: float = 1e-5) -> tuple[Array, Saved]:
    flat = _flat(x)
    normalised = flat - _mean_columns(flat)
    result = normalised * normalised
    inverse = 1 / array_module(x).sqrt(_mean_columns(result) + flat.dtype.type(epsilon))
    normalised *= inverse
    array_module(x).multiply(normalised, weight, out=result)
    result += bias
    return result.reshape(x.shape), (normalised, inverse, weight, x.shape)


def _layer_norm_x(g: Array, saved: Saved) -> Array:
    normalised, inverse, weight, shape = saved
    scaled = _flat(g) * weight
    result = scaled * normalised
    along = _mean_columns(result)
    array_module(g).multiply(normalised, along, out=result)
    result += _mean_columns(scaled)
    scaled -= result
    scaled *= inverse
    return scaled.reshape(shape)


def _layer_norm_weight(g: Array, saved: Saved) -> Array:
    normalised, _, _, _ = saved
    return _sum_rows(_flat(g) * normalised)


def _layer_norm_bias(g: Array, _saved: Saved) -> Array:
    return _sum_rows(_flat(g))


# gelu: the tanh form (Hendrycks 2016, arXiv 1606.08415); its derivative is made beside it, and is all that is
# kept


def _gelu(x: Array) -> tuple[Array, Saved]:
    xp = array_module(x)
    result, derivative = xp.empty(x.shape, x.dtype), xp.empty(x.shape, x.dtype)
    for block in _blocks(x, result, derivative):
        _gelu_block(xp, *block)
    return result, (derivative,)


def _gelu_block(xp: Any, x: Array, y: Array, slope: Array) -> None:
    """Set y = x·half and slope = half + x/2·(1 − tanh²)·slope(x), where half = (1 + tanh)/2."""
    xp.multiply(x, x, out=y)
    xp.multiply(y, 3 * _GELU_SLOPE * _GELU_CUBIC, out=slope)
    slope += _GELU_SLOPE
    y *= _GELU_SLOPE * _GELU_CUBIC
    y += _GELU_SLOPE
    y *= x
    half = xp.tanh(y)
    slope *= x
    slope *= 0.5
    xp.multiply(half, half, out=y)
    y *= slope
    slope -= y
    half *= 0.5
    half += 0.5
    slope += half
    xp.multiply(x, half, out=y)


def _gelu_x(g: Array, saved: Saved) -> Array:
    (derivative,) = saved
    derivative *= g
    return derivative


# causal_attention: softmax(q·kᵀ/√E, over earlier positions)·v for every head, from packed (B, S, H·3·E)
# (Vaswani 2017). The probabilities stay unnormalised: dividing the (S, E) result by their sums is cheaper
# than dividing (S, S) of them.


def _causal_attention(packed: Array, heads: int) -> tuple[Array, Saved]:
    xp = array_module(packed)
    sequences, positions, width = packed.shape
    size = width // (3 * heads)
    q, k, v = packed.reshape(sequences, positions, heads, 3, size).transpose(3, 0, 2, 1, 4)
    q = q * packed.dtype.type(1 / math.sqrt(size))
    weights = q @ k.swapaxes(-1, -2)
    weights += xp.triu(xp.full((positions, positions), -xp.inf, packed.dtype), 1)
    weights -= weights.max(axis=-1, keepdims=True)
    xp.exp(weights, out=weights)
    inverse = 1 / weights.sum(axis=-1, keepdims=True)
    result = xp.empty((sequences, positions, heads, size), packed.dtype)
    by_head = result.transpose(0, 2, 1, 3)
    xp.matmul(weights, v, out=by_head)
    by_head *= inverse
    return result.reshape(sequences, positions, heads * size), (q, k, v, weights, inverse, by_head)


def _causal_attention_packed(g: Array, saved: Saved) -> Array:
    xp = array_module(g)
    q, k, v, weights, inverse, result = saved
    sequences, heads, positions, size = q.shape
    g = g.reshape(sequences, positions, heads, size).transpose(0, 2, 1, 3) * inverse
    gradient = xp.empty((sequences, positions, heads, 3, size), g.dtype)
    q_gradient, k_gradient, v_gradient = gradient.transpose(3, 0, 2, 1, 4)
    xp.matmul(weights.swapaxes(-1, -2), g, out=v_gradient)
    scores = g @ v.swapaxes(-1, -2)
    scores -= (g * result).sum(axis=-1, keepdims=True)
    scores *= weights
    xp.matmul(scores, k, out=q_gradient)
    q_gradient *= 1 / math.sqrt(size)
    xp.matmul(scores.swapaxes(-1, -2), q, out=k_gradient)
    return gradient.reshape(sequences, positions, heads * 3 * size)


# cross_entropy: scale · Σ over tokens of −log softmax(logits)[target]; the sum is in float64 whatever the
# dtype of the logits


def _cross_entropy(logits: Array, targets: Array, scale: float = 1.0) -> tuple[Array, Saved]:
    xp = array_module(logits)
    flat, targets = _flat(logits), targets.reshape(-1)
    shifted = flat - flat.max(axis=1, keepdims=True)
    chosen = shifted[xp.arange(len(targets)), targets]
    exponentials = xp.exp(shifted, out=shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    loss = (xp.log(sums[:, 0]) - chosen).sum(dtype=xp.float64) * scale
    return xp.asarray(loss), (exponentials, sums, targets, scale, logits.shape)


def _cross_entropy_logits(g: Array, saved: Saved) -> Array:
    probabilities, sums, targets, scale, shape = saved
    xp = array_module(probabilities)
    factor = (g * scale).astype(probabilities.dtype)
    probabilities *= factor / sums
    probabilities[xp.arange(len(targets)), targets] -= factor
    return probabilities.reshape(shape)


add = Operation("add", _add, (_add_left, _add_right))
linear = Operation("linear", _linear, (_linear_x, _linear_weight, _linear_bias))
project = Operation("project", _project, (_linear_x, _linear_weight))
embedding = Operation("embedding", _embedding, (_embedding_table,))
layer_norm = Operation("layer_norm", _layer_norm, (_layer_norm_x, _layer_norm_weight, _layer_norm_bias))
gelu = Operation("gelu", _gelu, (_gelu_x,))
causal_attention = Operation("causal_attention", _causal_attention, (_causal_attention_packed,))
cross_entropy = Operation("cross_entropy", _cross_entropy, (_cross_entropy_logits,))

TABLE: dict[str, Operation] = {
    row.name: row for row in (add, linear, project, embedding, layer_norm, gelu, causal_attention, cross_entropy)
}
