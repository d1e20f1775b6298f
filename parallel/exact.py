"""Sums over samples in a fixed tree, so that their bits do not depend on which rank holds which samples.

The tree is the one over the samples' global numbers: node (level, index) is the sum of samples index·2^level …
(index + 1)·2^level − 1, its left half plus its right half. What remains of a count that is no power of two is added from
right to left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from parallel.autograd import Array
from parallel.formulas import share
from parallel.units import GRAIN

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


def most_nodes(count: int, ranks: int, merged: int) -> int:
    """The most nodes that `merged` neighbouring ranks, each with its share of `count` samples, have together."""
    runs = [share(count, ranks, rank) for rank in range(ranks)]
    groups = [range(runs[first].start, runs[first + merged - 1].stop) for first in range(0, ranks, merged)]
    return max(len(complete_nodes(run)) for run in groups)


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


def grain_sums(arrays: Iterable[Array]) -> Array:
    """The sums of squares of every run of GRAIN elements, in float64; parts of a unit always begin at such a run."""
    return np.concatenate([np.square(array, dtype=np.float64).reshape(-1, GRAIN).sum(axis=1) for array in arrays])


def exact_sum(values: Iterable[float]) -> float:
    """The sum, rounded once: it does not depend on the order."""
    return math.fsum(values)
