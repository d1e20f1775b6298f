"""Bruck's all-gather."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("all_gather", "bruck")
def bruck_all_gather(size: int, root: int) -> Schedule:
    """In step k every rank gets up to 2ᵏ blocks from the rank 2ᵏ places back: ⌈log₂ p⌉ steps for any p.

    (p − 1)/p·N bytes sent per rank, N the gathered size (Bruck et al., 1997). Blocks go to their place at once,
    so that nothing is rotated at the end; a range that wraps round the end of the buffer travels as two messages.
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

    return Schedule("all_gather", "bruck", size, program)
