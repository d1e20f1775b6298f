"""The one table of differentiable operations: a row is a forward function and its vector-Jacobian products.

Rows are as coarse as a transformer's parts, so that each pass over memory is a deliberate one; what is no matrix
product is a fused kernel. Notation in the comments: N tokens (all leading axes flattened), B sequences, S positions,
D width, V vocabulary; g is the gradient of the row's result. The rows of attention are made in `attention.py`. To
add an operation write its functions, add its row to TABLE, and a case to the table's test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import fused
from parallel.autograd import across
from parallel.autograd.attention import causal_attention as causal_attention
from parallel.autograd.attention import ring_attention as ring_attention
from parallel.autograd.placement import COPIED, FEATURES, OUTPUTS, PARTIAL, REPLICATED, SEQUENCE, rule
from parallel.autograd.tensor import Array, Operation, Saved, Tensor, VectorJacobianProduct, array_module, is_recording

if TYPE_CHECKING:
    from parallel.axis import Axis, Cut

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


# add: left + right, where right may lack leading axes (the positions, shared by all sequences, or a bias); `axis` as for
# layer_norm


def _add(left: Tensor, right: Tensor, axis: Axis | None = None) -> tuple[Array, Saved]:
    if left.shape[left.data.ndim - right.data.ndim :] != right.shape:
        raise ValueError(f"add: the second operand's shape {right.shape} is no ending of the first's, {left.shape}")
    return left.data + right.data, (right.shape, axis)


def _add_left(g: Array, _saved: Saved) -> Array:
    return g


def _add_right(g: Array, saved: Saved) -> Array:
    shape, axis = saved
    if g.shape == shape:
        return g
    if axis is not None:
        return axis.sum_positions(_flat(g)[None])[0]
    return _sum_rows(g.reshape(-1, math.prod(shape))).reshape(shape)


# project: x (…, I) times the transposed weight (O, I). With `tiles`, how the dimension that ranks cut is cut, its pieces are
# products of their own, and a sum over it is given as nodes of a tree along a new first axis (see parallel/axis.py)


def _project(x: Tensor, weight: Tensor, tiles: Cut | None = None) -> tuple[Array, Saved]:
    flat, outputs = _flat(x.data), len(weight.data)
    saved = (flat, weight, x.shape, tiles)
    if tiles is None:
        return (flat @ weight.data.T).reshape(*x.shape[:-1], outputs), saved
    if weight.placement == OUTPUTS:
        result = array_module(flat).empty((len(flat), outputs), flat.dtype)
        for tile in tiles.tiles():
            result[:, tile] = flat @ weight.data[tile].T
        return result.reshape(*x.shape[:-1], outputs), saved
    nodes = tiles.nodes(lambda tile: flat[:, tile] @ weight.data[:, tile].T)
    return nodes.reshape(len(nodes), *x.shape[:-1], outputs), saved


def _project_x(g: Array, saved: Saved) -> Array:
    _, weight, shape, tiles = saved
    flat = _flat(g)
    if tiles is None:
        return (flat @ weight.data).reshape(shape)
    if weight.placement == OUTPUTS:
        nodes = tiles.nodes(lambda tile: flat[:, tile] @ weight.data[tile])
        return nodes.reshape(len(nodes), *shape)
    result = array_module(flat).empty((len(flat), shape[-1]), flat.dtype)
    for tile in tiles.tiles():
        result[:, tile] = flat @ weight.data[:, tile]
    return result.reshape(shape)


def _project_weight(g: Array, saved: Saved) -> Array:
    x, weight, _, tiles = saved
    flat = _flat(g)
    if tiles is None:
        return flat.T @ x
    result = array_module(flat).empty(weight.shape, flat.dtype)
    for tile in tiles.tiles():
        if weight.placement == OUTPUTS:
            result[tile] = flat[:, tile].T @ x
        else:
            result[:, tile] = flat.T @ x[:, tile]
    return result


# linear: project, plus bias (O,)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, tiles: Cut | None = None) -> tuple[Array, Saved]:
    result, saved = _project(x, weight, tiles)
    result += bias.data
    return result, saved


def _linear_bias(g: Array, _saved: Saved) -> Array:
    return _sum_rows(_flat(g))


# embedding: rows of the table (V, D) for an integer array of tokens. The table may be the rows from `first` on of a longer
# one, and 0 is what other tokens get; with `in_order` the gradient is added up token after token


def _embedding(table: Tensor, tokens: Array, first: int = 0, in_order: bool = False) -> tuple[Array, Saved]:
    rows = tokens - first
    saved = table.shape, rows, in_order
    if table.placement != OUTPUTS:
        return table.data[rows], saved
    inside = (rows >= 0) & (rows < len(table.data))
    result = table.data[array_module(rows).where(inside, rows, 0)]
    result[~inside] = 0
    return result, saved


def _embedding_table(g: Array, saved: Saved) -> Array:
    (rows, width), tokens, in_order = saved
    xp, flat = array_module(g), g.reshape(-1, width)
    inside = xp.flatnonzero((tokens >= 0) & (tokens < rows))
    tokens = tokens.reshape(-1)[inside]
    if rows <= _ONE_HOT_LIMIT and not in_order:
        # Tokens repeat, and a product with one-hot rows adds them up far quicker than scattering.
        one_hot = xp.zeros((len(flat), rows), g.dtype)
        one_hot[inside, tokens] = 1
        return one_hot.T @ flat
    gradient: Array = xp.zeros((rows, width), g.dtype)
    xp.add.at(gradient, tokens, flat[inside])
    return gradient


# layer_norm: over the last axis, then times weight (D,) plus bias (D,)  (Ba 2016, arXiv 1607.06450). With `axis`, whose
# ranks may have a run of the positions each, the gradients of weight and bias are sums over a tree of all positions


def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = 1e-5, axis: Axis | None = None
) -> tuple[Array, Saved]:
    xp, flat = array_module(x.data), _flat(x.data)
    result, mean, inverse = xp.empty_like(flat), xp.empty(len(flat), flat.dtype), xp.empty(len(flat), flat.dtype)
    fused.layer_norm(flat, weight.data, bias.data, epsilon, result, mean, inverse)
    return result.reshape(x.shape), (flat, weight, mean, inverse, axis, [])


def _layer_norm_products(g: Array, saved: Saved) -> tuple[Array, ...]:
    x, weight, mean, inverse, axis, _ = saved
    xp, flat = array_module(g), _flat(g)
    result = xp.empty_like(x)
    weight_gradient, bias_gradient = xp.zeros_like(weight.data), xp.zeros_like(weight.data)
    fused.layer_norm_backward(flat, x, weight.data, mean, inverse, result, weight_gradient, bias_gradient)
    if axis is not None:
        normal = (x - mean[:, None]) * inverse[:, None]
        weight_gradient, bias_gradient = axis.sum_positions(xp.stack([normal * flat, flat]))
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
# alone, which is `first` + row·`row_stride` + column in every one of the `runs` (rows, first) of the flattened x, in order
# (Srivastava 2014)


def _dropout(x: Tensor, **options: Any) -> tuple[Array, Saved]:
    return _dropped(x.data, options), (options,)


def _dropout_x(g: Array, saved: Saved) -> Array:
    (options,) = saved
    return _dropped(g, options)


def _dropped(array: Array, options: dict[str, Any]) -> Array:
    flat = _flat(array_module(array).ascontiguousarray(array))
    result = array_module(flat).empty_like(flat)
    others, start = {name: value for name, value in options.items() if name != "runs"}, 0
    for rows, first in options["runs"]:
        run = slice(start, start + rows)
        fused.dropout(flat[run], out=result[run], first=first, **others)
        start += rows
    return result.reshape(array.shape)


# cross_entropy: scale · Σ over tokens of −log softmax(logits)[target]; the sum is in float64 whatever the
# dtype of the logits


def _cross_entropy(logits: Tensor, targets: Array, scale: float = 1.0) -> tuple[Array, Saved]:
    xp, flat = array_module(logits.data), _flat(logits.data)
    losses = xp.empty(len(flat), np.float64)
    gradient = xp.empty_like(flat) if is_recording() else None
    fused.cross_entropy(flat, xp.ascontiguousarray(targets.reshape(-1)), scale, losses, gradient)
    return xp.asarray(losses.sum() * scale), (gradient, logits.shape)


_IN = "what the ranks of a cut layer read goes through copy_to_ranks or gather_sequence first"
_OUT = "what they made goes through sum_over_ranks or scatter_sequence first"

add = Operation(
    "add", _add, (_add_left, _add_right),
    rule(
        (SEQUENCE, SEQUENCE, SEQUENCE), (SEQUENCE, COPIED, SEQUENCE),
        summing=(SEQUENCE, REPLICATED, SEQUENCE), hint=_OUT,
    ),
)  # fmt: skip
project = Operation(
    "project", _project, (_project_x, _project_weight),
    rule((COPIED, OUTPUTS, FEATURES), (FEATURES, FEATURES, PARTIAL), hint=_IN),
)  # fmt: skip
linear = Operation(
    "linear", _linear, (_project_x, _project_weight, _linear_bias),
    rule((COPIED, OUTPUTS, FEATURES, FEATURES), hint=_IN),
)  # fmt: skip
embedding = Operation("embedding", _embedding, (_embedding_table,), rule((OUTPUTS, PARTIAL), (COPIED, SEQUENCE)))
layer_norm = Operation(
    "layer_norm", _layer_norm, _together(_layer_norm_products, 3),
    rule(
        (SEQUENCE, COPIED, COPIED, SEQUENCE),
        summing=(SEQUENCE, REPLICATED, REPLICATED, SEQUENCE), hint=_OUT,
    ),
)  # fmt: skip
gelu = Operation("gelu", _gelu, _together(_gelu_products, 2), rule((FEATURES, FEATURES, FEATURES)))
dropout = Operation("dropout", _dropout, (_dropout_x,), rule((SEQUENCE, SEQUENCE), hint=_OUT))
cross_entropy = Operation("cross_entropy", _cross_entropy, (across.kept_gradient,))

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
        *across.ROWS,
    )
}
