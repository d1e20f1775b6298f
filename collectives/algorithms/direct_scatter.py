"""Direct scatter."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("scatter", "direct")
def direct_scatter(size: int, root: int) -> Schedule:
    """The root sends every rank its block, all at once: one hop.

    (p − 1)/p·N bytes sent by the root (the flat tree of Pješivac-Grbović et al., 2007).
    """

    def program(rank: int) -> Iterator[Row]:
        if rank == root:
            others = (send(peer, Ref("in", peer)) for peer in range(size) if peer != root)
            yield copy(Ref("in", root), Ref("out", 0)), *others
        else:
            yield (recv(root, Ref("out", 0)),)

    return Schedule("scatter", "direct", size, program, root)
