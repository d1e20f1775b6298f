"""ZB-H1, a zero-bubble schedule with the memory of 1F1B."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.schedules.actions import Action, forward, input_gradient, weight_gradient
from parallel.schedules.registry import schedule
from parallel.schedules.table import Schedule, round_robin


@schedule(
    "zb-h1",
    idle="(p - 1) * (F + B_i) - (min(M, p) - 1) * W",
    idle_if="W <= B_i and W <= F",
    in_flight="min(M, p)",
)
def zb_h1(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """1F1B with backward in two halves: nobody waits for the weight half, which fills what was idle at the end.

    Rank r lets r input gradients go before the first weight gradient, so that every rank holds as many micro-batches, p, as
    the first rank does under 1F1B (section 2.1 of arXiv 2401.10241). The idle time is (p − 1)·(F + B_i − W) from M = p on; fewer
    micro-batches have fewer weight gradients to fill it with, M − 1 instead of p − 1. That holds while W ≤ F and W ≤ B_i:
    longer weight gradients delay other ranks, or end last themselves.
    """

    def row(rank: int) -> Iterator[Action]:
        ahead = min(ranks - rank - 1, micro_batches)
        yield from map(forward, range(ahead))
        for micro_batch in range(micro_batches):
            if ahead + micro_batch < micro_batches:
                yield forward(ahead + micro_batch)
            yield input_gradient(micro_batch)
            if micro_batch >= rank:
                yield weight_gradient(micro_batch - rank)
        yield from map(weight_gradient, range(max(micro_batches - rank, 0), micro_batches))

    rows = tuple(tuple(row(rank)) for rank in range(ranks))
    return Schedule("zb-h1", ranks, chunks, micro_batches, rows, round_robin(ranks))
