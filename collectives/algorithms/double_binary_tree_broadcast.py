"""Double-binary-tree broadcast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.algorithms.trees import two_trees
from collectives.schedule import Instruction, Ref, Row, Schedule, copy, recv, send


@algorithm("broadcast", "double_binary_tree")
def double_binary_tree_broadcast(size: int, root: int) -> Schedule:
    """Each half of the data goes down a binary tree of the other ranks, slice after slice: about 2·log₂ p steps.

    N bytes sent by the root, and at most N by every other rank (Sanders, Speck and Träff, 2009).
    """
    trees = []
    for parents in two_trees(size - 1):
        children: list[list[int]] = [[] for _ in parents]
        for position, parent in enumerate(parents):
            if parent is not None:
                children[parent].append(position)
        trees.append((parents, children, _arrivals(children, parents.index(None) if parents else None)))

    def program(rank: int) -> Iterator[Row]:
        # The root has no position in the trees; the others have theirs in the order in which they follow it.
        position = (rank - root) % size - 1
        rows: dict[int, list[Instruction]] = defaultdict(list)
        if position < 0:
            rows[-1].append(copy(Ref("in", 0, 2), Ref("out", 0, 2)))
        for half, (parents, children, arrivals) in enumerate(trees):
            if position < 0:
                if parents:
                    rows[0].append(send((root + 1 + parents.index(None)) % size, Ref("in", half)))
                continue
            parent = parents[position]
            source = root if parent is None else (root + 1 + parent) % size
            rows[arrivals[position]].append(recv(source, Ref("out", half)))
            for child in children[position]:
                rows[arrivals[child]].append(send((root + 1 + child) % size, Ref("out", half)))
        for _, row in sorted(rows.items()):
            yield tuple(row)

    return Schedule("broadcast", "double_binary_tree", size, program, root, pieces=2)


def _arrivals(children: list[list[int]], top: int | None) -> list[int]:
    """The row in which the data reaches every position: 0 at the top, children one after the other."""
    arrivals = [0] * len(children)
    reached = [] if top is None else [top]
    for position in reached:
        for number, child in enumerate(children[position]):
            arrivals[child] = arrivals[position] + 1 + number
            reached.append(child)
    return arrivals
