"""Attention of each position to itself and to earlier ones (Vaswani 2017), the heads in groups that share keys and values.

Notation: B sequences, S positions, H heads in G groups of R = H/G (Ainslie 2023, arXiv 2305.13245; G = H is multi-head and
G = 1 multi-query attention), E elements a head. A packed projection (B, S, (H + 2·G)·E) is ordered (group, (queries of the
group's heads, key, value), element), so that a run of groups is a run of its rows. Queries are (B, G, R, S, E), keys and
values (B, G, 1, S, E): products broadcast them over the heads of a group, and no copies are made.
"""

from __future__ import annotations

import math

from kernels import fused
from parallel.autograd.tensor import Array, Operation, Saved, Tensor, array_module

_RUN = 64


def _groups(name: str, packed: Array, heads: int, groups: int | None) -> int:
    """The number of groups, `heads` by default, if the projection fits."""
    groups = heads if groups is None else groups
    if groups < 1 or heads % groups:
        raise ValueError(f"{name}: groups must divide heads, but {heads} is no multiple of {groups}")
    if packed.shape[-1] % (heads + 2 * groups):
        raise ValueError(
            f"{name}: packed has shape {packed.shape}, expected a last axis of a multiple of {heads + 2 * groups}: "
            f"{heads} queries, {groups} keys and {groups} values"
        )
    return groups


def _split(packed: Array, heads: int, groups: int) -> tuple[Array, Array, Array]:
    """The queries, keys and values of a packed projection, as views."""
    sequences, positions, width = packed.shape
    rows = heads // groups + 2
    by_group = packed.reshape(sequences, positions, groups, rows, width // (groups * rows)).transpose(0, 2, 3, 1, 4)
    return by_group[:, :, :-2], by_group[:, :, -2:-1], by_group[:, :, -1:]


def _by_head(result: Array, heads: int, groups: int) -> Array:
    """A result (B, S, H·E) as (B, G, R, S, E), as a view."""
    sequences, positions, width = result.shape
    split = result.reshape(sequences, positions, groups, heads // groups, width // heads)
    return split.transpose(0, 2, 3, 1, 4)


def _runs(start: int, stop: int) -> list[slice]:
    """Positions in runs: no product is made of the keys of runs behind the queries'."""
    return [slice(first, min(first + _RUN, stop)) for first in range(start, stop, _RUN)]


def _over_queries(weights: Array, rows: Array, out: Array) -> None:
    """Set `out` (B, G, 1, keys, E) to weightsᵀ·rows, summed over the queries of all heads of a group."""
    xp, turned = array_module(rows), weights.swapaxes(-1, -2)
    xp.matmul(turned[:, :, :1], rows[:, :, :1], out=out)
    for head in range(1, rows.shape[2]):
        out += xp.matmul(turned[:, :, head : head + 1], rows[:, :, head : head + 1])


def _causal_attention(packed: Tensor, heads: int, groups: int | None = None) -> tuple[Array, Saved]:
    data = packed.data
    groups = _groups("causal_attention", data, heads, groups)
    xp = array_module(data)
    q, k, v = _split(data, heads, groups)
    sequences, positions = data.shape[:2]
    size = q.shape[-1]
    weights = xp.empty((*q.shape[:-1], positions), data.dtype)
    for run in _runs(0, positions):
        seen = slice(0, run.stop)
        xp.matmul(q[..., run, :], k[..., seen, :].swapaxes(-1, -2), out=weights[..., run, seen])
    fused.causal_softmax(weights, 1 / math.sqrt(size), 0)
    result = xp.empty((sequences, positions, heads * size), data.dtype)
    by_head = _by_head(result, heads, groups)
    for run in _runs(0, positions):
        seen = slice(0, run.stop)
        xp.matmul(weights[..., run, seen], v[..., seen, :], out=by_head[..., run, :])
    return result, (data, weights)


def _causal_attention_packed(g: Array, saved: Saved) -> Array:
    packed, weights = saved
    xp = array_module(g)
    _, groups, shared, positions, _ = weights.shape
    heads = groups * shared
    q, k, v = _split(packed, heads, groups)
    g = _by_head(g, heads, groups)
    gradient = xp.empty(packed.shape, packed.dtype)
    q_gradient, k_gradient, v_gradient = _split(gradient, heads, groups)
    scores = xp.empty_like(weights)
    for run in _runs(0, positions):
        seen = slice(0, run.stop)
        xp.matmul(g[..., run, :], v[..., seen, :].swapaxes(-1, -2), out=scores[..., run, seen])
    fused.causal_softmax_backward(scores, weights, 1 / math.sqrt(q.shape[-1]), 0, scores)
    for run in _runs(0, positions):
        seen, seeing = slice(0, run.stop), slice(run.start, positions)
        xp.matmul(scores[..., run, seen], k[..., seen, :], out=q_gradient[..., run, :])
        _over_queries(scores[..., seeing, run], q[..., seeing, :], k_gradient[..., run, :])
        _over_queries(weights[..., seeing, run], g[..., seeing, :], v_gradient[..., run, :])
    return gradient


causal_attention = Operation("causal_attention", _causal_attention, (_causal_attention_packed,))
