"""Binomial tree scatter."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.algorithms.trees import Binomial
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("scatter", "binomial")
def binomial_scatter(size: int, root: int) -> Schedule:
    """Blocks part on the way from the root: ⌈log₂ p⌉ steps instead of p − 1 messages at the root.

    Up to N/2·log₂ p bytes on the longest way, N the scattered size; (p − 1)/p·N sent by the root, at most N/2 by any other
    (Thakur, Rabenseifner and Gropp, 2005). Blocks of equal counts only.
    """
    tree = Binomial(size, root)

    def program(rank: int) -> Iterator[Row]:
        own, position = tree.blocks(rank), tree.position(rank)
        if rank == root:
            yield (copy(Ref("in", root), Ref("out", 0)),)
        else:
            parent, held = tree.parent(rank), Ref("tmp", 0, own) if own > 1 else Ref("out", 0)
            if parent != root:
                yield (recv(parent, held),)
            else:  # the root's buffer may wrap round in the middle of these blocks
                yield tuple(
                    recv(root, Ref(held.buffer, (ref.chunk - root) % size - position, ref.count))
                    for ref in tree.placed("in", rank)
                )
        for distance, child in reversed(tree.children(rank)):
            if rank == root:
                yield tuple(send(child, ref) for ref in tree.placed("in", child))
            else:
                yield (send(child, Ref("tmp", distance, tree.blocks(child))),)
        if rank != root and own > 1:
            yield (copy(Ref("tmp", 0), Ref("out", 0)),)

    def scratch(rank: int) -> tuple[Ref, ...]:
        return () if rank == root else (Ref("out", 0),) * tree.blocks(rank)

    return Schedule("scatter", "binomial", size, program, root, scratch=scratch, even=True)
