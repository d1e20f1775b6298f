"""One forward, one backward."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.schedules.actions import Action, backward, forward
from parallel.schedules.registry import schedule
from parallel.schedules.table import Schedule, round_robin


@schedule("1f1b", idle="(p - 1) * (F + B)", in_flight="min(M, p - r)")
def one_f_one_b(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Backward begins as soon as it can, so that a rank holds no more than the stages after it and its own need.

    Rank r runs p − r − 1 forwards ahead, then one forward and one backward in turn (PipeDream-Flush, arXiv 2006.09503; section
    2.2.1 of arXiv 2104.04473). The idle time is that of GPipe.
    """

    def row(rank: int) -> Iterator[Action]:
        ahead = min(ranks - rank - 1, micro_batches)
        yield from map(forward, range(ahead))
        for micro_batch in range(micro_batches):
            if ahead + micro_batch < micro_batches:
                yield forward(ahead + micro_batch)
            yield backward(micro_batch)

    rows = tuple(tuple(row(rank)) for rank in range(ranks))
    return Schedule("1f1b", ranks, chunks, micro_batches, rows, round_robin(ranks))
