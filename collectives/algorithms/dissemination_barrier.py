"""Dissemination barrier."""

from __future__ import annotations

from dataclasses import replace

from collectives.algorithms.bruck_all_gather import bruck_all_gather
from collectives.algorithms.registry import algorithm
from collectives.schedule import Schedule


@algorithm("barrier", "dissemination")
def dissemination_barrier(size: int, root: int) -> Schedule:
    """In step k every rank hears from the rank 2ᵏ places back, and so of all that this one had heard of: ⌈log₂ size⌉ steps.

    Hensgen, Finkel and Manber, 1988; the same steps as Bruck's all-gather. The tokens make what a barrier promises provable:
    at the end a rank holds everyone's. p − 1 bytes sent per rank.
    """
    return replace(bruck_all_gather(size, root), collective="barrier", algorithm="dissemination")
