"""Ring all-reduce."""

from __future__ import annotations

from collectives.algorithms.registry import algorithm
from collectives.algorithms.ring_all_gather import ring_all_gather
from collectives.algorithms.ring_reduce_scatter import ring_reduce_scatter
from collectives.compose import all_reduce_from
from collectives.schedule import Schedule


@algorithm("all_reduce", "ring")
def ring_all_reduce(size: int, root: int) -> Schedule:
    """Ring reduce-scatter, then ring all-gather: 2·(size − 1) steps.

    Bandwidth-optimal: 2·(p − 1)/p·N bytes sent per rank (Patarasuk and Yuan, 2009). Each chunk is reduced by one rank after
    the other and then copied, so that the result has the same bits on all ranks.
    """
    return all_reduce_from(ring_reduce_scatter(size, root), ring_all_gather(size, root), "ring")
