"""Binomial tree reduce."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv_reduce, send


@algorithm("reduce", "binomial")
def binomial_reduce(size: int, root: int) -> Schedule:
    """The mirror of the binomial broadcast: partial sums meet in pairs, ⌈log₂ size⌉ steps.

    N bytes sent per rank but the root.
    Thakur, Rabenseifner and Gropp, 2005, section 4.4.
    """

    def program(rank: int) -> Iterator[Row]:
        position = (rank - root) % size
        partial = Ref("out", 0) if position == 0 else Ref("tmp", 0)
        held = Ref("in", 0)
        for step in range((size - 1).bit_length()):
            distance = 1 << step
            if position % (2 * distance) == distance:
                yield (send((rank - distance) % size, held),)
                return
            if position + distance < size:
                yield (recv_reduce((rank + distance) % size, held, partial),)
                held = partial
        if size == 1:
            yield (copy(held, partial),)

    return Schedule("reduce", "binomial", size, program, root, scratch=lambda rank: (Ref("in", 0),))
