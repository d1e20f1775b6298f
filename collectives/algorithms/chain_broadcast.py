"""Pipelined chain broadcast."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("broadcast", "chain")
def chain_broadcast(size: int, root: int) -> Schedule:
    """From neighbour to neighbour, slice after slice: every rank sends the data once, the bandwidth bound for long messages.

    With slices of m bytes the time approaches N/bandwidth + (p − 2)·(m/bandwidth + latency) (Träff and Ripke, 2008, section 2).
    """

    def program(rank: int) -> Iterator[Row]:
        position = (rank - root) % size
        following, previous = (rank + 1) % size, (rank - 1) % size
        last = position == size - 1
        if position == 0:
            own = copy(Ref("in", 0), Ref("out", 0))
            yield (own,) if last else (own, send(following, Ref("in", 0)))
            return
        yield (recv(previous, Ref("out", 0)),)
        if not last:
            yield (send(following, Ref("out", 0)),)

    return Schedule("broadcast", "chain", size, program, root)
