"""Direct reduce-scatter."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, fold, recv, send


@algorithm("reduce_scatter", "direct")
def direct_reduce_scatter(size: int, root: int) -> Schedule:
    """Every rank sends block r straight to rank r, which folds what it gets in rank order: one hop.

    (p − 1)/p·N bytes sent per rank in p − 1 messages, N of scratch (the first half of MSCCLang's all-pairs all-reduce,
    Cowan et al., 2023).
    """

    def program(rank: int) -> Iterator[Row]:
        exchange = [copy(Ref("in", rank), Ref("tmp", rank))]
        for distance in range(1, size):
            to, back = (rank + distance) % size, (rank - distance) % size
            exchange += [send(to, Ref("in", to)), recv(back, Ref("tmp", back))]
        yield tuple(exchange)
        yield (fold(Ref("tmp", 0, size), Ref("out", 0)),)

    return Schedule("reduce_scatter", "direct", size, program, scratch=lambda rank: (Ref("out", 0),) * size)
