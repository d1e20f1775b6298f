"""Sums over samples in a fixed tree, so that their bits do not depend on which rank holds which samples.

The tree is the one over the samples' global numbers: node (level, index) is the sum of samples index·2^level …
(index + 1)·2^level − 1, its left half plus its right half. What remains of a count that is no power of two is added from
right to left.

What a sample gives is fixed only if its own arithmetic is. So samples are computed one at a time: every matrix product then
has the same shape whatever the layout, and BLAS, which chooses by shape in which order it adds up, the same order. It
chooses by the number of its threads as well (OpenBLAS's kernels for Haswell give other bits with two threads than with one),
so matrix products must be given the same number on every rank and in every run that is to be compared:
`python -m parallel` gives them one. Another processor, or another BLAS, may still add up in another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.formulas import share

if TYPE_CHECKING:
    from collectives import Communicator, Work
    from parallel.autograd import Array

Place = tuple[int, int]
"""A node: its level and its index there."""


def complete_nodes(samples: range) -> list[Place]:
    """The largest nodes that lie wholly in a run of samples, from left to right."""
    nodes, start = [], samples.start
    while start < samples.stop:
        level = 0
        while start % (2 << level) == 0 and start + (2 << level) <= samples.stop:
            level += 1
        nodes.append((level, start >> level))
        start += 1 << level
    return nodes


def most_nodes(runs: Iterable[range]) -> int:
    """The most nodes that one of these runs holds."""
    return max(len(complete_nodes(run)) for run in runs)


def sample_runs(count: int, ranks: int, merged: int = 1) -> list[range]:
    """The shares that groups of `merged` neighbouring ranks have of `count` samples."""
    runs = [share(count, ranks, rank) for rank in range(ranks)]
    return [range(runs[first].start, runs[first + merged - 1].stop) for first in range(0, ranks, merged)]


class TreeSum:
    """Adds arrays up by the tree. `release` gets arrays that are not needed any more."""

    def __init__(self, release: Callable[[Array], None] = lambda array: None) -> None:
        self._release = release
        self._nodes: dict[Place, Array] = {}

    def add(self, place: Place, array: Array) -> None:
        """Put in the sum of a node; the array is this tree's from now on."""
        level, index = place
        while (sibling := self._nodes.pop((level, index ^ 1), None)) is not None:
            left, right = (sibling, array) if index & 1 else (array, sibling)
            left += right
            self._release(right)
            array, level, index = left, level + 1, index >> 1
        self._nodes[level, index] = array

    def nodes(self) -> list[tuple[Place, Array]]:
        """What there is, from left to right."""
        return sorted(self._nodes.items(), key=lambda item: item[0][1] << item[0][0])

    def total(self) -> Array:
        """The sum of everything, when all samples from 0 on are there."""
        *rest, (_, sum_) = self.nodes()
        for _, array in reversed(rest):
            array += sum_
            self._release(sum_)
            sum_ = array
        self._nodes.clear()
        return sum_

    def clear(self) -> None:
        """Release all nodes."""
        for array in self._nodes.values():
            self._release(array)
        self._nodes.clear()


def exchange_shapes(count: int, elements: int, size: int, replicas: int) -> list[tuple[int, ...]]:
    """The arrays that `sum_over_samples` sends and receives, within a group of `size` ranks, then among several groups."""
    ranks, length = size * replicas, elements // size
    within = (size, most_nodes(sample_runs(count, ranks)), length)
    if replicas == 1:
        return [within, within]
    nodes = most_nodes(sample_runs(count, ranks, size))
    return [within, within, (nodes, length), (replicas, nodes, length)]


def sum_over_samples(
    tree: TreeSum,
    count: int,
    elements: int,
    group: Communicator,
    replicas: Communicator,
    space: Array,
    wait: Callable[[str, Work[Any]], Array],
) -> Array:
    """Return this rank's part of the sum over all `count` samples of the ranks, whose own are in `tree`; collective.

    Every rank of a group gets the nodes of its part (an all_to_all), then the groups give one another theirs (an
    all_gather). Arguments: `elements`, of the arrays in the tree, a multiple of the group's size; `replicas`, the ranks
    that have the same part in other groups; `space`, a flat array for the arrays of `exchange_shapes`, in which the
    result lies, behind the first `elements`; `wait(name, work)` returns the result of a collective.
    """
    size, length = group.size, elements // group.size
    runs = sample_runs(count, size * replicas.size)
    sent, received, *among = _cut(space, exchange_shapes(count, elements, size, replicas.size))
    for row, (_, array) in enumerate(tree.nodes()):
        sent[:, row] = array.reshape(size, length)
    tree.clear()
    mine = runs[replicas.rank * size : (replicas.rank + 1) * size]
    merged = tree_of(mine, wait("all_to_all", group.all_to_all(sent, received, async_op=True)))
    if among:
        nodes, everyone = among
        spans = sample_runs(count, size * replicas.size, size)
        for row, (_, array) in enumerate(merged.nodes()):
            nodes[row] = array
        merged = tree_of(spans, wait("all_gather", replicas.all_gather(nodes, everyone, async_op=True)))
    return merged.total()


def _cut(space: Array, shapes: Iterable[tuple[int, ...]]) -> list[Array]:
    """Arrays of these shapes that lie in a flat one, one behind the other."""
    arrays, start = [], 0
    for shape in shapes:
        stop = start + math.prod(shape)
        arrays.append(space[start:stop].reshape(shape))
        start = stop
    return arrays


def tree_of(runs: Iterable[range], received: Iterable[Array]) -> TreeSum:
    """Return the nodes that lie in these runs: `received` has an array for each, a row of it for each node, and maybe more rows."""
    tree = TreeSum()
    for run, rows in zip(runs, received, strict=True):
        for place, row in zip(complete_nodes(run), rows, strict=False):
            tree.add(place, row)
    return tree


def tree_of_rows(array: Array, first: int) -> TreeSum:
    """Return the tree over the rows of an array (rows, …), which are those from number `first` on; the array is used up."""
    tree = TreeSum()
    for level, index in complete_nodes(range(first, first + len(array))):
        rows = array[(index << level) - first : ((index + 1) << level) - first]
        while len(rows) > 1:
            rows[0::2] += rows[1::2]
            rows = rows[0::2]
        tree.add((level, index), rows[0])
    return tree


def order_free_sum(
    arrays: Iterable[Array], count: int, largest: Callable[[float], float], total: Callable[[Array], Array]
) -> float:
    """Return the sum of numbers of several ranks, whose bits depend on no order and on no layout; collective.

    Numbers are rounded to multiples of one power of two, chosen by the largest of all, so that their sum is exact in float64;
    what was cut off is treated so again, twice (Demmel 2015, "Parallel reproducible summation", section 3). `arrays`: of
    float64, this rank's, none negative; `count`: at least how many numbers there are on all ranks. `largest(x)` and
    `total(array)` are the maximum of a number and the sum of an array over all ranks; each is called once, whatever the numbers.
    """
    arrays = list(arrays)
    peak = largest(max((float(array.max()) for array in arrays if array.size), default=0.0))
    usable = 0 < peak < math.inf
    room, exponent = count.bit_length(), math.frexp(peak)[1]
    sums = np.zeros(3)
    for array in arrays if usable else ():
        rest = array
        for fold in range(len(sums)):
            # Adding and taking away 1.5·2^k rounds to multiples of 2^(k − 52).
            anchor = math.ldexp(1.5, exponent + room - fold * (52 - room))
            rounded = (rest + anchor) - anchor
            rest = rest - rounded
            sums[fold] += rounded.sum()
    sums = total(sums)
    return math.fsum(sums.tolist()) if usable else peak


def exact_sum(values: Iterable[float]) -> float:
    """The sum, rounded once: it does not depend on the order."""
    return math.fsum(values)
