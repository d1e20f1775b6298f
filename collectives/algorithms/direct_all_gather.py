"""Direct all-gather."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("all_gather", "direct")
def direct_all_gather(size: int, root: int) -> Schedule:
    """Every rank sends its block straight to everyone: one hop.

    (p − 1)/p·N bytes sent per rank in p − 1 messages, N the gathered size (Thakur, Rabenseifner and Gropp, 2005).
    """

    def program(rank: int) -> Iterator[Row]:
        exchange = [copy(Ref("in", 0), Ref("out", rank))]
        for distance in range(1, size):
            to, back = (rank + distance) % size, (rank - distance) % size
            exchange += [send(to, Ref("in", 0)), recv(back, Ref("out", back))]
        yield tuple(exchange)

    return Schedule("all_gather", "direct", size, program)
