"""Halving-doubling all-reduce."""

from __future__ import annotations

from collectives.algorithms.recursive_doubling_all_gather import recursive_doubling_all_gather
from collectives.algorithms.recursive_halving_reduce_scatter import recursive_halving_reduce_scatter
from collectives.algorithms.registry import algorithm
from collectives.compose import all_reduce_from
from collectives.schedule import Schedule


@algorithm("all_reduce", "halving_doubling")
def halving_doubling_all_reduce(size: int, root: int) -> Schedule:
    """Recursive-halving reduce-scatter, then recursive-doubling all-gather: 2·log₂ p steps.

    2·(p − 1)/p·N bytes sent per rank; where p is no power of two, four steps more and up to 3·N by a host
    (Rabenseifner, 2004; Thakur, Rabenseifner and Gropp, 2005).
    """
    reduce_scatter = recursive_halving_reduce_scatter(size, root)
    return all_reduce_from(reduce_scatter, recursive_doubling_all_gather(size, root), "halving_doubling")
