"""Direct gather."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("gather", "direct")
def direct_gather(size: int, root: int) -> Schedule:
    """Every rank sends its block straight to the root, all at once: one hop.

    N/p bytes sent per rank but the root, N the gathered size (the flat tree of Pješivac-Grbović et al., 2007).
    """

    def program(rank: int) -> Iterator[Row]:
        if rank == root:
            others = (recv(peer, Ref("out", peer)) for peer in range(size) if peer != root)
            yield copy(Ref("in", 0), Ref("out", root)), *others
        else:
            yield (send(root, Ref("in", 0)),)

    return Schedule("gather", "direct", size, program, root)
