"""Direct all-to-all."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("all_to_all", "direct", in_place=False)
def direct_all_to_all(size: int, root: int) -> Schedule:
    """Every rank sends every block straight to its rank, all at once: one hop.

    (p − 1)/p·N bytes sent per rank in p − 1 messages (Thakur, Rabenseifner and Gropp, 2005).
    """

    def program(rank: int) -> Iterator[Row]:
        exchange = [copy(Ref("in", rank), Ref("out", rank))]
        for distance in range(1, size):
            to, back = (rank + distance) % size, (rank - distance) % size
            exchange += [send(to, Ref("in", to)), recv(back, Ref("out", back))]
        yield tuple(exchange)

    return Schedule("all_to_all", "direct", size, program)
