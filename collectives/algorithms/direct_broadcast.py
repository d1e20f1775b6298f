"""Direct broadcast."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("broadcast", "direct")
def direct_broadcast(size: int, root: int) -> Schedule:
    """The root sends everything to everyone at once: one hop.

    (p − 1)·N bytes sent by the root (the flat tree of Pješivac-Grbović et al., 2007).
    """

    def program(rank: int) -> Iterator[Row]:
        if rank == root:
            others = (send(peer, Ref("in", 0)) for peer in range(size) if peer != root)
            yield copy(Ref("in", 0), Ref("out", 0)), *others
        else:
            yield (recv(root, Ref("out", 0)),)

    return Schedule("broadcast", "direct", size, program, root)
