"""Direct all-reduce."""

from __future__ import annotations

from collectives.algorithms.direct_all_gather import direct_all_gather
from collectives.algorithms.direct_reduce_scatter import direct_reduce_scatter
from collectives.algorithms.registry import algorithm
from collectives.compose import all_reduce_from
from collectives.schedule import Schedule


@algorithm("all_reduce", "direct")
def direct_all_reduce(size: int, root: int) -> Schedule:
    """Direct reduce-scatter, then direct all-gather: two hops, each chunk folded by its owner in rank order.

    2·(p − 1)/p·N bytes sent per rank in 2·(p − 1) messages (the all-pairs algorithm of MSCCLang, Cowan et al., 2023).
    """
    return all_reduce_from(direct_reduce_scatter(size, root), direct_all_gather(size, root), "direct")
