"""Bruck's all-to-all."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("all_to_all", "bruck", in_place=False)
def bruck_all_to_all(size: int, root: int) -> Schedule:
    """Blocks travel by the binary digits of their distance, all that share a digit together: ⌈log₂ p⌉ steps for any p.

    About log₂ p/2·N bytes sent per rank, as much scratch (Bruck et al., 1997). Blocks of equal counts only.
    """
    rounds = [[block for block in range(size) if block >> bit & 1] for bit in range((size - 1).bit_length())]
    most = max(map(len, rounds), default=0)

    def program(rank: int) -> Iterator[Row]:
        # place[d]: where the block lies that is to travel d places. It is packed into tmp[0:most], and arrives after that.
        place = [Ref("in", (rank + distance) % size) for distance in range(size)]
        arrived = most
        for bit, travelling in enumerate(rounds):
            count = len(travelling)
            yield tuple(copy(place[distance], Ref("tmp", slot)) for slot, distance in enumerate(travelling))
            to, back = (rank + (1 << bit)) % size, (rank - (1 << bit)) % size
            yield send(to, Ref("tmp", 0, count)), recv(back, Ref("tmp", arrived, count))
            for slot, distance in enumerate(travelling):
                place[distance] = Ref("tmp", arrived + slot)
            arrived += count
        yield tuple(copy(place[distance], Ref("out", (rank - distance) % size)) for distance in range(size))

    chunks = most + sum(map(len, rounds))
    return Schedule(
        "all_to_all", "bruck", size, program, scratch=lambda rank: (Ref("in", 0),) * chunks, even=True
    )  # fmt: skip
