"""Direct scan."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, fold, recv, send


@algorithm("scan", "direct")
def direct_scan(size: int, root: int) -> Schedule:
    """Every rank sends its input to all ranks after it, and each folds what it gets in rank order: one hop.

    (p − 1 − rank)·N bytes sent by a rank.
    """

    def program(rank: int) -> Iterator[Row]:
        later = [send(peer, Ref("in", 0)) for peer in range(rank + 1, size)]
        earlier = [recv(peer, Ref("tmp", peer)) for peer in range(rank)]
        yield copy(Ref("in", 0), Ref("tmp", rank)), *later, *earlier
        yield (fold(Ref("tmp", 0, rank + 1), Ref("out", 0)),)

    return Schedule("scan", "direct", size, program, scratch=lambda rank: (Ref("in", 0),) * (rank + 1))
