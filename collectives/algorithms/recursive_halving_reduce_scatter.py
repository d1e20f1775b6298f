"""Recursive-halving reduce-scatter."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.core import Core
from collectives.algorithms.registry import algorithm
from collectives.schedule import Buffer, Ref, Row, Schedule, copy, recv, recv_reduce, send


@algorithm("reduce_scatter", "recursive_halving")
def recursive_halving_reduce_scatter(size: int, root: int) -> Schedule:
    """Partners at distance p/2, p/4, …, 1 swap the halves that the other answers for: log₂ p steps.

    (p − 1)/p·N bytes sent per rank; where p is no power of two, two steps more and N by a guest
    (Thakur, Rabenseifner and Gropp, 2005).
    """
    core = Core(size)

    def program(rank: int) -> Iterator[Row]:
        if core.is_guest(rank):
            yield (send(rank + 1, Ref("in", 0, size)),)
            yield (recv(rank + 1, Ref("out", 0)),)
            return
        held: Buffer = "in"
        if core.is_host(rank):
            yield (recv_reduce(rank - 1, Ref("in", 0, size), Ref("tmp", 0, size)),)
            held = "tmp"
        low, high, me = 0, core.members, core.member(rank)
        while high - low > 1:
            middle = (low + high) // 2
            kept, given = ((low, middle), (middle, high)) if me < middle else ((middle, high), (low, middle))
            peer = core.rank(me ^ (middle - low))
            yield (
                send(peer, _blocks(core, held, *given)),
                recv_reduce(peer, _blocks(core, held, *kept), _blocks(core, "tmp", *kept)),
            )
            (low, high), held = kept, "tmp"
        own = (copy(Ref(held, rank), Ref("out", 0)),)
        yield (*own, send(rank - 1, Ref(held, rank - 1))) if core.is_host(rank) else own

    def partial_sums(rank: int) -> list[Ref]:
        return [Ref("in", block) for block in range(size)]

    return Schedule("reduce_scatter", "recursive_halving", size, program, scratch=partial_sums)


def _blocks(core: Core, buffer: Buffer, low: int, high: int) -> Ref:
    """The blocks of the ranks that members low to high answer for."""
    first, after = core.first(low), core.first(high)
    return Ref(buffer, first, after - first)
