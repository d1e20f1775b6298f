"""The ranks that cut layers among them, and what they do with one another's arrays: sums, and runs of positions.

Two ways to add up. By default a sum is an all_reduce. With `exact` it has the same bits on any number of ranks: the dimension
that is summed over is cut into pieces in one way for all, every piece is a product of its own, and the pieces are added up in
the tree of `TreeSum` over their global numbers. A rank's part of such a sum is no single array but the nodes of the tree that
its pieces make, along a first axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from collectives import ReduceOp
from parallel.exact import TreeSum, most_nodes, tree_of, tree_of_rows
from parallel.formulas import share

if TYPE_CHECKING:
    from collectives import Communicator, Work
    from parallel.autograd import Array

GATHERED_BELOW = 1 << 19
"""Bytes: each rank gets the nodes of smaller arrays whole; on 4 ranks a step of arrays of 128 KiB takes 7 % less time so."""

TILES = 16
"""Pieces of a dimension that exact sums run over, where nothing else (heads) says how to cut it."""


@dataclass(frozen=True)
class Cut:
    """How a dimension of `length` elements is cut: into `pieces` of nearly equal length, of which each rank has a run."""

    length: int
    pieces: int
    ranks: int
    rank: int

    @property
    def run(self) -> range:
        """This rank's pieces."""
        return share(self.pieces, self.ranks, self.rank)

    @property
    def elements(self) -> range:
        """This rank's elements."""
        run = self.run
        return range(self.piece(run.start).start, self.piece(run.stop - 1).stop) if run else range(0)

    def piece(self, number: int) -> range:
        """The elements of a piece, of the whole dimension."""
        return share(self.length, self.pieces, number)

    def tiles(self) -> list[slice]:
        """This rank's pieces, as slices of its elements."""
        first = self.elements.start
        return [slice(self.piece(n).start - first, self.piece(n).stop - first) for n in self.run]

    def runs(self) -> list[range]:
        """The pieces of every rank."""
        return [share(self.pieces, self.ranks, rank) for rank in range(self.ranks)]

    def nodes(self, product: Callable[[slice], Array]) -> Array:
        """The nodes of the tree over this rank's pieces, along a new first axis; `product(tile)` is a piece's summand."""
        tree = TreeSum()
        for number, tile in zip(self.run, self.tiles(), strict=True):
            tree.add((0, number), product(tile))
        return np.stack([array for _, array in tree.nodes()])

    @property
    def most_nodes(self) -> int:
        """The most nodes that a rank has."""
        return most_nodes(self.runs())


class Axis:
    """The tensor-parallel ranks, to which layers are given.

    `sequence`: between the layers that are cut every rank has a run of the positions (Korthikanti 2022, arXiv 2205.05198)
    and not all of them. `exact`: sums in a fixed tree.
    """

    def __init__(self, communicator: Communicator, *, sequence: bool = False, exact: bool = False) -> None:
        self.communicator, self.sequence, self.exact = communicator, sequence, exact
        self.size, self.rank = communicator.size, communicator.rank

    def cut(self, length: int, pieces: int | None = None) -> Cut:
        """How the ranks cut a dimension; `pieces` that stay whole, by default elements, or with exact sums TILES."""
        if pieces is None:
            pieces = min(TILES, length) if self.exact else length
        return Cut(length, pieces, self.size, self.rank)

    def positions(self, count: int) -> range:
        """Which of `count` positions are this rank's between the layers that are cut."""
        return share(count, self.size, self.rank) if self.sequence else range(count)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array that collectives of these ranks work on without copying."""
        return self.communicator.empty(shape, dtype)

    def sum(self, array: Array, cut: Cut | None = None) -> Array:
        """The sum over all ranks, in a new array, or of one rank its own; with `cut`, of the tree's nodes, which are used up."""
        if cut is not None and self.exact:
            return self._sum_of_nodes(array, cut)
        if self.size == 1:
            return array
        whole = self.empty(array.shape, array.dtype)
        whole[...] = array
        return self.communicator.all_reduce(whole)

    def gathers(self, nbytes: int) -> bool:
        """Whether every rank adds up exact sums of so many bytes by itself."""
        return nbytes < GATHERED_BELOW

    def maximum(self, array: Array) -> Array:
        """The largest of all ranks' elements, in place."""
        return array if self.size == 1 else self.communicator.all_reduce(array, ReduceOp.MAX)

    def scatter(self, array: Array, cut: Cut | None = None) -> Array:
        """This rank's positions, the last axis but one, of the sum over all ranks; with `cut`, of the tree's nodes."""
        if cut is not None and self.exact:
            nodes = self._exchange_nodes(np.stack([self._by_rank(node) for node in array]), cut)
            return nodes.total()
        if self.size == 1:
            return array
        parts = self._by_rank(array)
        result = self.empty(parts.shape[1:], array.dtype)
        return self.communicator.reduce_scatter(parts, result)

    def gather(self, array: Array) -> Array:
        """All positions, the last axis but one, of which this rank has its run."""
        if self.size == 1:
            return array
        *leading, positions, width = array.shape
        parts = self.empty((self.size, *array.shape), array.dtype)
        self.communicator.all_gather(np.ascontiguousarray(array), parts)
        return np.moveaxis(parts, 0, -3).reshape(*leading, self.size * positions, width)

    def start_sum(self, array: Array) -> Work[Any]:
        """Begin to add up an array from `empty` in place."""
        return self.communicator.all_reduce(array, async_op=True)

    def start_scatter(self, array: Array, out: Array) -> Work[Any]:
        """Begin what `scatter` does, into an array from `empty`."""
        work: Work[Any] = self.communicator.reduce_scatter(self._by_rank(array), out, async_op=True)
        return work

    def gather_nodes(self, array: Array, runs: list[range]) -> Array:
        """The sum of small arrays over the tree, every rank adding up all of it.

        `array` holds this rank's nodes; `runs`: which numbers of the tree are whose.
        """
        mine = np.zeros((most_nodes(runs), *array.shape[1:]), array.dtype)
        mine[: len(array)] = array
        return tree_of(runs, self.communicator.all_gather(mine)).total()

    def sum_positions(self, array: Array) -> Array:
        """The sum over the positions of one sample, of which every rank has its run or all: (k, positions, width) as (k, width)."""
        count = array.shape[1]
        if count == 0:
            return array.sum(axis=1)
        first = self.rank * count if self.sequence else 0
        tree = tree_of_rows(np.array(np.moveaxis(array, 1, 0), order="C"), first)
        if not self.sequence or self.size == 1:
            return tree.total()
        runs = [range(rank * count, (rank + 1) * count) for rank in range(self.size)]
        return self.gather_nodes(np.stack([node for _, node in tree.nodes()]), runs)

    def _by_rank(self, array: Array) -> Array:
        """The positions of every rank side by side: (…, positions, width) as (ranks, …, positions / ranks, width)."""
        *leading, positions, width = array.shape
        split = array.reshape(*leading, self.size, positions // self.size, width)
        target = self.empty((self.size, *leading, positions // self.size, width), array.dtype)
        target[...] = np.moveaxis(split, -3, 0)
        return target

    def _sum_of_nodes(self, array: Array, cut: Cut) -> Array:
        """Every rank adds up the tree of an equal part of the elements, and then they gather the parts.

        Of small arrays each adds up all: one collective takes less time than two, though more is sent.
        """
        shape, elements = array.shape[1:], math.prod(array.shape[1:])
        if self.size == 1:
            return tree_of(cut.runs(), [array]).total()
        if self.gathers(elements * array.itemsize):
            return self.gather_nodes(array, cut.runs())
        length = -(-elements // self.size)
        padded = np.zeros((len(array), self.size * length), array.dtype)
        padded[:, :elements] = array.reshape(len(array), elements)
        total = self._exchange_nodes(padded.reshape(len(array), self.size, length), cut).total()
        return self.communicator.all_gather(total).reshape(-1)[:elements].reshape(shape)

    def _exchange_nodes(self, parts: Array, cut: Cut) -> TreeSum:
        """The tree of all ranks' nodes, of this rank's part; `parts` (nodes, ranks, …) are this rank's nodes of every part."""
        sent = np.zeros((self.size, cut.most_nodes, *parts.shape[2:]), parts.dtype)
        sent[:, : len(parts)] = np.moveaxis(parts, 1, 0)
        received = self.communicator.all_to_all(sent) if self.size > 1 else sent
        return tree_of(cut.runs(), received)
