"""Ring reduce-scatter."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv_reduce, send


@algorithm("reduce_scatter", "ring")
def ring_reduce_scatter(size: int, root: int) -> Schedule:
    """Partial sums travel once round the ring: size − 1 steps, each rank sends all blocks but its own.

    Block c starts at rank c + 1 and is complete when it reaches rank c, so its reduction order is c + 1, c + 2, …, c.
    Bandwidth-optimal: (p − 1)/p·N bytes sent per rank (Patarasuk and Yuan, 2009, section 3).
    """

    def program(rank: int) -> Iterator[Row]:
        if size == 1:
            yield (copy(Ref("in", 0), Ref("out", 0)),)
            return
        following, previous = (rank + 1) % size, (rank - 1) % size
        outgoing = Ref("in", previous)
        for step in range(size - 1):
            block = (rank - step - 2) % size
            target = Ref("out", 0) if block == rank else Ref("tmp", block)
            yield send(following, outgoing), recv_reduce(previous, Ref("in", block), target)
            outgoing = target

    def partial_sums(rank: int) -> list[Ref]:
        return [Ref("in", block) for block in range(size)]

    return Schedule("reduce_scatter", "ring", size, program, scratch=partial_sums)
