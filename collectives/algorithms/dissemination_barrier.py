"""Dissemination barrier."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("barrier", "dissemination")
def dissemination_barrier(size: int, root: int) -> Schedule:
    """In step k every rank hears from the rank 2ᵏ places back, and so of all that this one had heard of: ⌈log₂ size⌉ steps.

    Hensgen, Finkel and Manber, 1988. The tokens make what a barrier promises provable: at the end a rank holds everyone's.
    """

    def newest(rank: int, count: int) -> list[Ref]:
        """The blocks of the `count` ranks that end with `rank`: one range, or two where it wraps round."""
        start = (rank - count + 1) % size
        if start + count <= size:
            return [Ref("out", start, count)]
        return [Ref("out", start, size - start), Ref("out", 0, start + count - size)]

    def program(rank: int) -> Iterator[Row]:
        yield (copy(Ref("in", 0), Ref("out", rank)),)
        known = 1
        while known < size:
            count = min(known, size - known)
            to, back = (rank + known) % size, (rank - known) % size
            sends = [send(to, ref) for ref in newest(rank, count)]
            yield *sends, *(recv(back, ref) for ref in newest(back, count))
            known += count

    return Schedule("barrier", "dissemination", size, program)
