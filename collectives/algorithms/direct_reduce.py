"""Direct reduce."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, fold, recv, send


@algorithm("reduce", "direct")
def direct_reduce(size: int, root: int) -> Schedule:
    """Every rank sends its input straight to the root, which folds in rank order: one hop.

    N bytes sent per rank but the root, which takes in (p − 1)·N (the flat tree of Pješivac-Grbović et al., 2007).
    """

    def program(rank: int) -> Iterator[Row]:
        if rank != root:
            yield (send(root, Ref("in", 0)),)
            return
        others = (recv(peer, Ref("tmp", peer)) for peer in range(size) if peer != root)
        yield copy(Ref("in", 0), Ref("tmp", root)), *others
        yield (fold(Ref("tmp", 0, size), Ref("out", 0)),)

    def scratch(rank: int) -> tuple[Ref, ...]:
        return (Ref("in", 0),) * size if rank == root else ()

    return Schedule("reduce", "direct", size, program, root, scratch=scratch)
