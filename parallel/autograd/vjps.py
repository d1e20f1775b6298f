"""The one table of differentiable operations: a row is a forward function and its vector-Jacobian products.

Rows are as coarse as a transformer's parts, so that each pass over memory is a deliberate one; what is no matrix
product is a fused kernel. Notation in the comments: N tokens (all leading axes flattened), B sequences, S positions,
D width, V vocabulary; g is the gradient of the row's result. The rows of attention are made in `attention.py`. To
add an operation write its functions, add its row to TABLE, and a case to the table's test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels import fused
from parallel.autograd.attention import causal_attention as causal_attention
from parallel.autograd.attention import ring_attention as ring_attention
from parallel.autograd.tensor import Array, Operation, Saved, Tensor, VectorJacobianProduct, array_module, is_recording

_ONE_HOT_LIMIT = 1024


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
cross_entropy = Operation("cross_entropy", _cross_entropy, (_cross_entropy_logits,))

TABLE: dict[str, Operation] = {
    row.name: row
    for row in (
        add,
        project,
        linear,
        embedding,
        layer_norm,
        gelu,
        dropout,
        causal_attention,
        ring_attention,
        cross_entropy,
    )
}
