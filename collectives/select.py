"""Which algorithm runs: a function of the collective, the bytes and the number of ranks, the same on every rank."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from collectives.algorithms import Algorithm, registered
from collectives.spec import COLLECTIVES
from collectives.verify import verify

_CHAIN_BROADCAST_FROM: Final = 64 * 1024
"""Bytes from which filling a pipeline along the chain beats log₂ p hops of the whole."""

_ONLY: Final = {
    "all_reduce": "ring",
    "all_gather": "ring",
    "reduce_scatter": "ring",
    "reduce": "binomial",
    "gather": "direct",
    "scatter": "direct",
    "all_to_all": "pairwise",
    "scan": "chain",
    "barrier": "dissemination",
}


@lru_cache
def in_rank_order(entry: Algorithm) -> bool:
    """Whether every result of the algorithm is one fold in rank order, as the verifier finds (at 5 ranks, which tell)."""
    return verify(entry.schedule(5), in_place=False).rank_ordered


def choose(collective: str, nbytes: int, size: int, deterministic: bool = False) -> str:
    """The name of the algorithm for a message of `nbytes` (the whole buffer) over `size` ranks."""
    if deterministic:
        ordered = [entry.name for entry in registered(collective) if in_rank_order(entry)]
        if _ONLY.get(collective) not in ordered and COLLECTIVES[collective].reduces:
            return ordered[0]
    if collective == "broadcast":
        return "chain" if nbytes >= _CHAIN_BROADCAST_FROM and size > 2 else "binomial"
    return _ONLY[collective]
