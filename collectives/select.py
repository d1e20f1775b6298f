"""Which algorithm runs: a function of the collective, the bytes and the number of ranks, the same on every rank."""

from __future__ import annotations

from typing import Final

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


def choose(collective: str, nbytes: int, size: int) -> str:
    """The name of the algorithm for a message of `nbytes` (the whole buffer) over `size` ranks."""
    if collective == "broadcast":
        return "chain" if nbytes >= _CHAIN_BROADCAST_FROM and size > 2 else "binomial"
    return _ONLY[collective]
