"""GPipe."""

from __future__ import annotations

from parallel.schedules.actions import backward, forward
from parallel.schedules.registry import schedule
from parallel.schedules.table import Schedule, round_robin


@schedule("gpipe", idle="(p - 1) * (F + B)", in_flight="M")
def gpipe(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Every micro-batch forward, then every one backward; all activations are held (arXiv 1811.06965).

    Backward takes the micro-batches in the order of forward, as all schedules here do, so that gradients are summed in one
    order whatever the schedule; the paper draws the opposite one, which takes the same time.
    """
    row = (*map(forward, range(micro_batches)), *map(backward, range(micro_batches)))
    return Schedule("gpipe", ranks, chunks, micro_batches, (row,) * ranks, round_robin(ranks))
