"""Double-binary-tree all-reduce."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.algorithms.trees import two_trees
from collectives.schedule import Instruction, Ref, Row, Schedule, copy, recv, recv_reduce, send


@algorithm("all_reduce", "double_binary_tree")
def double_binary_tree_all_reduce(size: int, root: int) -> Schedule:
    """Each half of the data goes up and down a binary tree of its own, slice after slice: about 4·log₂ p steps.

    At most 2·N bytes sent per rank, N by most: the leaves of one tree are inner ranks of the other
    (Sanders, Speck and Träff, 2009). Every sum is made by one rank and then copied.
    """
    trees = []
    for parents in two_trees(size):
        children: list[list[int]] = [[] for _ in range(size)]
        for rank, parent in enumerate(parents):
            if parent is not None:
                children[parent].append(rank)
        trees.append((parents, children, _heights(parents)))
    turning = 2 * (max(max(heights) for _, _, heights in trees) + 1)

    def program(rank: int) -> Iterator[Row]:
        if size == 1:
            yield (copy(Ref("in", 0, 2), Ref("out", 0, 2)),)
        # Both sides of a message have it in the row of the same time, which rules out a deadlock.
        rows: dict[int, list[Instruction]] = defaultdict(list)
        for half, (parents, children, heights) in enumerate(trees):
            total, parent = Ref("out", half), parents[rank]
            for number, child in enumerate(children[rank]):
                time = 2 * heights[rank] + number
                rows[time].append(recv_reduce(child, total if number else Ref("in", half), total))
                rows[2 * turning - time].append(send(child, total))
            if parent is not None:
                time = 2 * heights[parent] + children[parent].index(rank)
                rows[time].append(send(parent, total if children[rank] else Ref("in", half)))
                rows[2 * turning - time].append(recv(parent, total))
        for _, row in sorted(rows.items()):
            yield tuple(row)

    return Schedule("all_reduce", "double_binary_tree", size, program, pieces=2)


def _heights(parents: list[int | None]) -> list[int]:
    """The longest way down to a leaf, for every rank."""
    heights = [0] * len(parents)
    for leaf in range(len(parents)):
        height, rank = 0, leaf
        while (parent := parents[rank]) is not None:
            rank, height = parent, height + 1
            heights[rank] = max(heights[rank], height)
    return heights
