"""The one table of differentiable operations: a row is a forward function and its vector-Jacobian products.

Rows are as coarse as a transformer's parts, so that each pass over memory is a deliberate one; what is no matrix
product is a fused kernel. Notation in the comments: N tokens (all leading axes flattened), B sequences, S positions,
D width, H heads, E = D/H, V vocabulary; g is the gradient of the row's result. To add an operation write its
functions, add its row to TABLE, and a case to the table's test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels import fused
from parallel.autograd.tensor import Array, Operation, Saved, Tensor, VectorJacobianProduct, array_module, is_recording

_ONE_HOT_LIMIT = 1024
_ATTENTION_RUN = 64


def _flat(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def _sum_rows(matrix: Array) -> Array:
    sums = array_module(matrix).zeros(matrix.shape[1], matrix.dtype)
    fused.column_sums(matrix, sums)
    return sums


def _together(products: Callable[[Array, Saved], tuple[Array, ...]], count: int) -> tuple[VectorJacobianProduct, ...]:
    """The products of a row that come from one pass, which the first of them makes: `saved` ends with an empty list."""

    def pick(number: int) -> VectorJacobianProduct:
        def product(g: Array, saved: Saved) -> Array:
            made: list[Array] = saved[-1]
            if not made:
                made.extend(products(g, saved))
            return made[number]

        return product

    return tuple(pick(number) for number in range(count))


# add: left + right, where right may lack leading axes (the positions, shared by all sequences)


def _add(left: Tensor, right: Tensor) -> tuple[Array, Saved]:
    if left.shape[left.data.ndim - right.data.ndim :] != right.shape:
        raise ValueError(f"add: the second operand's shape {right.shape} is no ending of the first's, {left.shape}")
    return left.data + right.data, (right.shape,)


def _add_left(g: Array, _saved: Saved) -> Array:
    return g


def _add_right(g: Array, saved: Saved) -> Array:
    (shape,) = saved
    return g if g.shape == shape else _sum_rows(g.reshape(-1, math.prod(shape))).reshape(shape)


# project: x (…, I) times the transposed weight (O, I)


def _project(x: Tensor, weight: Tensor) -> tuple[Array, Saved]:
    flat = _flat(x.data)
    return (flat @ weight.data.T).reshape(*x.shape[:-1], len(weight.data)), (flat, weight, x.shape)


def _project_x(g: Array, saved: Saved) -> Array:
    _, weight, shape = saved
    return (_flat(g) @ weight.data).reshape(shape)


def _project_weight(g: Array, saved: Saved) -> Array:
    flat, _, _ = saved
    return _flat(g).T @ flat


# linear: project, plus bias (O,)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Array, Saved]:
    result, saved = _project(x, weight)
    result += bias.data
    return result, saved


def _linear_bias(g: Array, _saved: Saved) -> Array:
    return _sum_rows(_flat(g))


# embedding: rows of the table (V, D) for an integer array of tokens


def _embedding(table: Tensor, tokens: Array) -> tuple[Array, Saved]:
    return table.data[tokens], (table.shape, tokens)


def _embedding_table(g: Array, saved: Saved) -> Array:
    (rows, width), tokens = saved
    xp = array_module(g)
    if rows <= _ONE_HOT_LIMIT:
        # Tokens repeat, and a product with one-hot rows adds them up far quicker than scattering.
        one_hot = xp.zeros((tokens.size, rows), g.dtype)
        one_hot[xp.arange(tokens.size), tokens.reshape(-1)] = 1
        return one_hot.T @ g.reshape(-1, width)
    gradient: Array = xp.zeros((rows, width), g.dtype)
    xp.add.at(gradient, tokens.reshape(-1), g.reshape(-1, width))
    return gradient


# layer_norm: over the last axis, then times weight (D,) plus bias (D,)  (Ba 2016, arXiv 1607.06450)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5) -> tuple[Array, Saved]:
    xp, flat = array_module(x.data), _flat(x.data)
    result, mean, inverse = xp.empty_like(flat), xp.empty(len(flat), flat.dtype), xp.empty(len(flat), flat.dtype)
    fused.layer_norm(flat, weight.data, bias.data, epsilon, result, mean, inverse)
    return result.reshape(x.shape), (flat, weight, mean, inverse, [])


def _layer_norm_products(g: Array, saved: Saved) -> tuple[Array, ...]:
    x, weight, mean, inverse, _ = saved
    xp, flat = array_module(g), _flat(g)
    result = xp.empty_like(x)
    weight_gradient, bias_gradient = xp.zeros_like(weight.data), xp.zeros_like(weight.data)
    fused.layer_norm_backward(flat, x, weight.data, mean, inverse, result, weight_gradient, bias_gradient)
    return result.reshape(g.shape), weight_gradient, bias_gradient


# gelu: of x + bias (D,), in the tanh form (Hendrycks 2016, arXiv 1606.08415)


def _gelu(x: Tensor, bias: Tensor) -> tuple[Array, Saved]:
    data = array_module(x.data).ascontiguousarray(x.data)
    result = array_module(data).empty_like(data)
    fused.gelu(data, bias.data, result)
    return result, (data, bias, [])


def _gelu_products(g: Array, saved: Saved) -> tuple[Array, ...]:
    x, bias, _ = saved
    result = array_module(x).empty_like(x)
    fused.gelu_backward(array_module(g).ascontiguousarray(g), x, bias.data, result)
    return result, _sum_rows(_flat(result))


# dropout: zero with this probability, else scaled; whether an element stays depends on the key and its own number
# `first` + row·`row_stride` + column alone, rows being those of the flattened x (Srivastava 2014)


def _dropout(x: Tensor, **options: Any) -> tuple[Array, Saved]:
    return _dropped(x.data, options), (options,)


def _dropout_x(g: Array, saved: Saved) -> Array:
    (options,) = saved
    return _dropped(g, options)


def _dropped(array: Array, options: dict[str, Any]) -> Array:
    flat = _flat(array_module(array).ascontiguousarray(array))
    result = array_module(flat).empty_like(flat)
    fused.dropout(flat, out=result, **options)
    return result.reshape(array.shape)


# causal_attention: softmax(q·kᵀ/√E, over earlier positions)·v for every head, from packed (B, S, H·3·E)
# (Vaswani 2017)


def _heads(packed: Array, heads: int) -> Array:
    """The queries, keys and values of packed (B, S, H·3·E), each (B, H, S, E), as views."""
    sequences, positions, width = packed.shape
    return packed.reshape(sequences, positions, heads, 3, width // (3 * heads)).transpose(3, 0, 2, 1, 4)


def _runs(positions: int) -> list[slice]:
    """Positions in runs: no product is made of the keys of runs behind the queries'."""
    return [slice(start, min(start + _ATTENTION_RUN, positions)) for start in range(0, positions, _ATTENTION_RUN)]


def _causal_attention(packed: Tensor, heads: int) -> tuple[Array, Saved]:
    data = packed.data
    xp = array_module(data)
    sequences, positions, width = data.shape
    size = width // (3 * heads)
    q, k, v = _heads(data, heads)
    weights = xp.empty((sequences, heads, positions, positions), data.dtype)
    for run in _runs(positions):
        seen = slice(0, run.stop)
        xp.matmul(q[:, :, run], k[:, :, seen].swapaxes(-1, -2), out=weights[:, :, run, seen])
    fused.causal_softmax(weights, 1 / math.sqrt(size), 0)
    result = xp.empty((sequences, positions, heads, size), data.dtype)
    by_head = result.transpose(0, 2, 1, 3)
    for run in _runs(positions):
        seen = slice(0, run.stop)
        xp.matmul(weights[:, :, run, seen], v[:, :, seen], out=by_head[:, :, run])
    return result.reshape(sequences, positions, heads * size), (data, weights)


def _causal_attention_packed(g: Array, saved: Saved) -> Array:
    packed, weights = saved
    xp = array_module(g)
    sequences, heads, positions, _ = weights.shape
    q, k, v = _heads(packed, heads)
    size = q.shape[-1]
    g = g.reshape(sequences, positions, heads, size).transpose(0, 2, 1, 3)
    gradient = xp.empty_like(packed)
    q_gradient, k_gradient, v_gradient = _heads(gradient, heads)
    scores = xp.empty_like(weights)
    for run in _runs(positions):
        seen = slice(0, run.stop)
        xp.matmul(g[:, :, run], v[:, :, seen].swapaxes(-1, -2), out=scores[:, :, run, seen])
    fused.causal_softmax_backward(scores, weights, 1 / math.sqrt(size), 0, scores)
    for run in _runs(positions):
        seen, seeing = slice(0, run.stop), slice(run.start, positions)
        xp.matmul(scores[:, :, run, seen], k[:, :, seen], out=q_gradient[:, :, run])
        xp.matmul(scores[:, :, seeing, run].swapaxes(-1, -2), q[:, :, seeing], out=k_gradient[:, :, run])
        xp.matmul(weights[:, :, seeing, run].swapaxes(-1, -2), g[:, :, seeing], out=v_gradient[:, :, run])
    return gradient


# cross_entropy: scale · Σ over tokens of −log softmax(logits)[target]; the sum is in float64 whatever the
# dtype of the logits


def _cross_entropy(logits: Tensor, targets: Array, scale: float = 1.0) -> tuple[Array, Saved]:
    xp, flat = array_module(logits.data), _flat(logits.data)
    losses = xp.empty(len(flat), np.float64)
    gradient = xp.empty_like(flat) if is_recording() else None
    fused.cross_entropy(flat, xp.ascontiguousarray(targets.reshape(-1)), scale, losses, gradient)
    return xp.asarray(losses.sum() * scale), (gradient, logits.shape)


def _cross_entropy_logits(g: Array, saved: Saved) -> Array:
    gradient, shape = saved
    if g != 1:
        gradient *= g
    return gradient.reshape(shape)


add = Operation("add", _add, (_add_left, _add_right))
project = Operation("project", _project, (_project_x, _project_weight))
linear = Operation("linear", _linear, (_project_x, _project_weight, _linear_bias))
embedding = Operation("embedding", _embedding, (_embedding_table,))
layer_norm = Operation("layer_norm", _layer_norm, _together(_layer_norm_products, 3))
gelu = Operation("gelu", _gelu, _together(_gelu_products, 2))
dropout = Operation("dropout", _dropout, (_dropout_x,))
causal_attention = Operation("causal_attention", _causal_attention, (_causal_attention_packed,))
cross_entropy = Operation("cross_entropy", _cross_entropy, (_cross_entropy_logits,))

TABLE: dict[str, Operation] = {
    row.name: row
    for row in (add, project, linear, embedding, layer_norm, gelu, dropout, causal_attention, cross_entropy)
}
