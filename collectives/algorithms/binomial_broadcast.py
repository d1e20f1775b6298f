"""Binomial tree broadcast."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("broadcast", "binomial")
def binomial_broadcast(size: int, root: int) -> Schedule:
    """The ranks that have the data double every step: ⌈log₂ size⌉ steps, the latency bound for short messages.

    Up to ⌈log₂ p⌉·N bytes sent, by the root; N·(p − 1) over all ranks.
    Thakur, Rabenseifner and Gropp, 2005, section 4.2.
    """

    def program(rank: int) -> Iterator[Row]:
        position = (rank - root) % size
        held = Ref("in", 0) if position == 0 else Ref("out", 0)
        if position == 0:
            yield (copy(Ref("in", 0), Ref("out", 0)),)
        for step in range((size - 1).bit_length()):
            distance = 1 << step
            if position < distance and position + distance < size:
                yield (send((rank + distance) % size, held),)
            elif distance <= position < 2 * distance:
                yield (recv((rank - distance) % size, held),)

    return Schedule("broadcast", "binomial", size, program, root)
