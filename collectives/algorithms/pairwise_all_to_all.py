"""Pairwise all-to-all."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("all_to_all", "pairwise", in_place=False)
def pairwise_all_to_all(size: int, root: int) -> Schedule:
    """In step k every rank sends to the rank k places on and receives from the rank k places back: size − 1 steps.

    Every block crosses the wire once (Thakur, Rabenseifner and Gropp, 2005, section 4.5).
    """

    def program(rank: int) -> Iterator[Row]:
        yield (copy(Ref("in", rank), Ref("out", rank)),)
        for distance in range(1, size):
            to, back = (rank + distance) % size, (rank - distance) % size
            yield send(to, Ref("in", to)), recv(back, Ref("out", back))

    return Schedule("all_to_all", "pairwise", size, program)
