"""Ring all-gather."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("all_gather", "ring")
def ring_all_gather(size: int, root: int) -> Schedule:
    """Every block travels once round the ring: size − 1 steps, each rank passes on what it received last.

    Bandwidth-optimal: (p − 1)/p·N bytes sent per rank, N the gathered size (Patarasuk and Yuan, 2009, section 3).
    """

    def program(rank: int) -> Iterator[Row]:
        own = copy(Ref("in", 0), Ref("out", rank))
        if size == 1:
            yield (own,)
            return
        following, previous = (rank + 1) % size, (rank - 1) % size
        yield own, send(following, Ref("in", 0)), recv(previous, Ref("out", previous))
        for step in range(1, size - 1):
            passed_on, block = (rank - step) % size, (rank - step - 1) % size
            yield send(following, Ref("out", passed_on)), recv(previous, Ref("out", block))

    return Schedule("all_gather", "ring", size, program)
