"""Recursive-doubling all-reduce."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.core import Core
from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, recv, recv_reduce, send


@algorithm("all_reduce", "recursive_doubling")
def recursive_doubling_all_reduce(size: int, root: int) -> Schedule:
    """Partners at distance 1, 2, 4, … swap everything they have: log₂ p steps, two more where p is no power of two.

    log₂ p·N bytes sent per rank; where p is no power of two, ⌊log₂ p⌋·N, and N more by a host. Both partners add the same
    two numbers, so that all ranks hold the same bits (Thakur, Rabenseifner and Gropp, 2005).
    """
    core = Core(size)

    def program(rank: int) -> Iterator[Row]:
        held, result = Ref("in", 0), Ref("out", 0)
        if core.is_guest(rank):
            yield (send(rank + 1, held),)
            yield (recv(rank + 1, result),)
            return
        if core.is_host(rank):
            yield (recv_reduce(rank - 1, held, Ref("tmp", 0)),)
            held = Ref("tmp", 0)
        distance = 1
        while distance < core.members:
            peer = core.rank(core.member(rank) ^ distance)
            # What is being sent must stay as it is: sums go to and fro between the two scratch chunks.
            target = Ref("tmp", 1 if held == Ref("tmp", 0) else 0)
            yield send(peer, held), recv_reduce(peer, held, target)
            held, distance = target, 2 * distance
        yield (copy(held, result),)
        if core.is_host(rank):
            yield (send(rank - 1, result),)

    return Schedule("all_reduce", "recursive_doubling", size, program, scratch=lambda rank: (Ref("in", 0),) * 2)
