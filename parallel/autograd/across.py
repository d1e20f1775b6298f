"""The rows of the table that cross the ranks of a tensor-parallel axis: Megatron's f and g, and the two of sequence parallelism.

(Shoeybi 2019, arXiv 1909.08053, section 3; Korthikanti 2022, arXiv 2205.05198, section 4.2.) In each the product of backward is
the forward of its counterpart. `axis` is the Axis; `cut`, where a sum comes from layers that are cut, says how (exact sums need it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.autograd.placement import COPIED, FEATURES, PARTIAL, REPLICATED, SEQUENCE, Placement, only
from parallel.autograd.tensor import Array, Operation, Saved, Tensor, array_module, is_recording

if TYPE_CHECKING:
    from parallel.axis import Axis, Cut

_CHUNKS = 4
"""A product is made in so many parts, each of which is being added up while the next one is made."""


# copy_to_ranks (f): x, which every rank has and of which each makes a part of the gradient


def _copy_to_ranks(x: Tensor, axis: Axis, cut: Cut | None = None) -> tuple[Array, Saved]:
    return x.data, (axis, cut)


def _sum_product(g: Array, saved: Saved) -> Array:
    axis, cut = saved
    return axis.sum(g, cut)


# sum_over_ranks (g): the sum of all ranks' parts


def _sum_over_ranks(x: Tensor, axis: Axis, cut: Cut | None = None) -> tuple[Array, Saved]:
    return axis.sum(x.data, cut), ()


def _same_product(g: Array, _saved: Saved) -> Array:
    return g


# gather_sequence: all positions, of which every rank has a run


def _gather_sequence(x: Tensor, axis: Axis, cut: Cut | None = None) -> tuple[Array, Saved]:
    return axis.gather(x.data), (axis, cut)


def _scatter_product(g: Array, saved: Saved) -> Array:
    axis, cut = saved
    return axis.scatter(g, cut)


# scatter_sequence: this rank's run of the positions of the sum of all ranks' parts


def _scatter_sequence(x: Tensor, axis: Axis, cut: Cut | None = None) -> tuple[Array, Saved]:
    return axis.scatter(x.data, cut), (axis,)


def _gather_product(g: Array, saved: Saved) -> Array:
    (axis,) = saved
    return axis.gather(g)


# project_and_sum: project, then sum_over_ranks or scatter_sequence, part by part, so that a part is on its way while the next
# one is computed


def _project_and_sum(x: Tensor, weight: Tensor, axis: Axis) -> tuple[Array, Saved]:
    data, outputs, turned = x.data, len(weight.data), weight.data.T
    samples, positions, inputs = data.shape
    saved: Saved = (data, weight, axis, [])
    if axis.sequence:
        result = axis.empty((samples, positions // axis.size, outputs), data.dtype)
        works = []
        for chunk in chunks(samples):
            part = data[chunk].reshape(-1, inputs) @ turned
            works.append(axis.start_scatter(part.reshape(-1, positions, outputs), result[chunk]))
    else:
        result = axis.empty((samples, positions, outputs), data.dtype)
        rows, flat = result.reshape(-1, outputs), data.reshape(-1, inputs)
        works = []
        for chunk in chunks(len(rows)):
            np.matmul(flat[chunk], turned, out=rows[chunk])
            works.append(axis.start_sum(rows[chunk]))
    for work in works:
        work.wait()
    return result, saved


def chunks(count: int) -> list[slice]:
    """The parts in which so many rows, or samples, are computed and added up."""
    length = max(1, -(-count // _CHUNKS))
    return [slice(start, min(count, start + length)) for start in range(0, count, length)]


def _gathered(g: Array, saved: Saved) -> Array:
    """The gradient of all positions, which the first product that needs it gathers."""
    *_, axis, gathered = saved
    if not gathered:
        gathered.append(axis.gather(g) if axis.sequence else g)
    whole: Array = gathered[0]
    return whole


def _project_and_sum_x(g: Array, saved: Saved) -> Array:
    x, weight, _, _ = saved
    whole = _gathered(g, saved)
    return (whole.reshape(-1, whole.shape[-1]) @ weight.data).reshape(x.shape)


def _project_and_sum_weight(g: Array, saved: Saved) -> Array:
    x, _, _, _ = saved
    whole = _gathered(g, saved)
    return whole.reshape(-1, whole.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def _placed_project_and_sum(operation: str, inputs: Sequence[Placement], options: Mapping[str, Any]) -> Placement:
    result = SEQUENCE if options["axis"].sequence else REPLICATED
    return only(FEATURES, FEATURES, result)(operation, inputs, options)


# vocabulary_cross_entropy: as cross_entropy, of logits of which every rank has a run of the vocabulary, the one of `cut`; three
# numbers a token are reduced, and the logits never gathered (Shoeybi 2019, section 3)


def _vocabulary_cross_entropy(
    logits: Tensor, targets: Array, axis: Axis, cut: Cut, scale: float = 1.0
) -> tuple[Array, Saved]:
    xp = array_module(logits.data)
    flat = logits.data.reshape(-1, logits.shape[-1])
    rows, wanted = xp.arange(len(flat)), targets.reshape(-1) - cut.elements.start
    largest = axis.maximum(flat.max(axis=1))
    shifted = flat - largest[:, None]
    inside = (wanted >= 0) & (wanted < flat.shape[1])
    column = xp.where(inside, wanted, 0)
    target = xp.where(inside, shifted[rows, column], 0)
    exponentials = xp.empty_like(shifted)

    def summed(tile: slice) -> Array:
        part = xp.exp(xp.ascontiguousarray(shifted[:, tile]))
        exponentials[:, tile] = part
        return part.sum(axis=1)

    if axis.exact:
        sums, target = axis.gather_nodes(cut.nodes(summed), cut.runs()), axis.sum(target)
    else:
        sums, target = axis.sum(xp.stack([summed(slice(None)), target]))
    losses = xp.log(sums.astype(np.float64)) - target
    gradient = None
    if is_recording():
        gradient = exponentials
        gradient *= (scale / sums)[:, None]
        gradient[rows[inside], column[inside]] -= scale
    return xp.asarray(losses.sum() * scale), (gradient, logits.shape)


def kept_gradient(g: Array, saved: Saved) -> Array:
    """The product of a loss that has kept the gradient of its logits, and their shape."""
    gradient, shape = saved
    if g != 1:
        gradient *= g
    return gradient.reshape(shape)


project_and_sum = Operation(
    "project_and_sum", _project_and_sum, (_project_and_sum_x, _project_and_sum_weight), _placed_project_and_sum
)

_SUM_FIRST = "what the ranks of a cut layer made is partial, everything else is no sum"

copy_to_ranks = Operation("copy_to_ranks", _copy_to_ranks, (_sum_product,), only(REPLICATED, COPIED))
sum_over_ranks = Operation(
    "sum_over_ranks", _sum_over_ranks, (_same_product,), only(PARTIAL, REPLICATED, hint=_SUM_FIRST)
)
gather_sequence = Operation("gather_sequence", _gather_sequence, (_scatter_product,), only(SEQUENCE, COPIED))
scatter_sequence = Operation(
    "scatter_sequence", _scatter_sequence, (_gather_product,), only(PARTIAL, SEQUENCE, hint=_SUM_FIRST)
)
vocabulary_cross_entropy = Operation(
    "vocabulary_cross_entropy",
    _vocabulary_cross_entropy,
    (kept_gradient,),
    only(FEATURES, REPLICATED),
)

ROWS = (copy_to_ranks, sum_over_ranks, gather_sequence, scatter_sequence, project_and_sum, vocabulary_cross_entropy)
