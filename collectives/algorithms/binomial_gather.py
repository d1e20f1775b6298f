"""Binomial tree gather."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.algorithms.trees import Binomial
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("gather", "binomial")
def binomial_gather(size: int, root: int) -> Schedule:
    """Blocks meet on the way to the root: ⌈log₂ p⌉ steps instead of p − 1 messages at the root.

    Up to N/2 bytes sent per rank, N the gathered size (the mirror of the scatter of Thakur, Rabenseifner and Gropp, 2005).
    Blocks of equal counts only.
    """
    tree = Binomial(size, root)

    def program(rank: int) -> Iterator[Row]:
        own, position = tree.blocks(rank), tree.position(rank)
        if rank == root:
            yield (copy(Ref("in", 0), Ref("out", root)),)
        elif own > 1:
            yield (copy(Ref("in", 0), Ref("tmp", 0)),)
        for distance, child in tree.children(rank):
            if rank == root:
                yield tuple(recv(child, ref) for ref in tree.placed("out", child))
            else:
                yield (recv(child, Ref("tmp", distance, tree.blocks(child))),)
        if rank == root:
            return
        parent = tree.parent(rank)
        held = Ref("tmp", 0, own) if own > 1 else Ref("in", 0)
        if parent != root:
            yield (send(parent, held),)
        else:  # the root's buffer may wrap round in the middle of these blocks
            yield tuple(
                send(root, Ref(held.buffer, (ref.chunk - root) % size - position, ref.count))
                for ref in tree.placed("out", rank)
            )

    def scratch(rank: int) -> tuple[Ref, ...]:
        return () if rank == root else (Ref("in", 0),) * tree.blocks(rank)

    return Schedule("gather", "binomial", size, program, root, scratch=scratch, even=True)
