"""Recursive-doubling all-gather."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.core import Core
from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, send


@algorithm("all_gather", "recursive_doubling")
def recursive_doubling_all_gather(size: int, root: int) -> Schedule:
    """Partners at distance 1, 2, 4, … swap all blocks they have: log₂ p steps.

    (p − 1)/p·N bytes sent per rank, N the gathered size; where p is no power of two, two steps more and up to 2·N by a host
    (Thakur, Rabenseifner and Gropp, 2005).
    """
    core = Core(size)

    def others(pair: int) -> list[Ref]:
        """All blocks but the two of the pair that begins with this rank."""
        refs = [Ref("out", 0, pair), Ref("out", pair + 2, size - pair - 2)]
        return [ref for ref in refs if ref.count]

    def blocks(low: int, high: int) -> Ref:
        first, after = core.first(low), core.first(high)
        return Ref("out", first, after - first)

    def program(rank: int) -> Iterator[Row]:
        own = copy(Ref("in", 0), Ref("out", rank))
        if core.is_guest(rank):
            yield own, send(rank + 1, Ref("in", 0)), recv(rank + 1, Ref("out", rank + 1))
            yield tuple(recv(rank + 1, ref) for ref in others(rank))
            return
        host = core.is_host(rank)
        yield (own, send(rank - 1, Ref("in", 0)), recv(rank - 1, Ref("out", rank - 1))) if host else (own,)
        distance, me = 1, core.member(rank)
        while distance < core.members:
            peer, mine = me ^ distance, me - me % distance
            theirs = peer - peer % distance
            yield (
                send(core.rank(peer), blocks(mine, mine + distance)),
                recv(core.rank(peer), blocks(theirs, theirs + distance)),
            )
            distance *= 2
        if host:
            yield tuple(send(rank - 1, ref) for ref in others(rank - 1))

    return Schedule("all_gather", "recursive_doubling", size, program)
