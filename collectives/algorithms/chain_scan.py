"""Chain scan."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv_reduce, send


@algorithm("scan", "chain")
def chain_scan(size: int, root: int) -> Schedule:
    """Each rank adds its input to the prefix of the rank before it and passes the sum on, slice after slice.

    N bytes sent per rank but the last; p − 1 hops.
    """

    def program(rank: int) -> Iterator[Row]:
        if rank == 0:
            yield (copy(Ref("in", 0), Ref("out", 0)),)
        else:
            yield (recv_reduce(rank - 1, Ref("in", 0), Ref("out", 0)),)
        if rank + 1 < size:
            yield (send(rank + 1, Ref("out", 0)),)

    return Schedule("scan", "chain", size, program)
