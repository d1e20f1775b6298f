"""Interleaved 1F1B."""

from __future__ import annotations

from collections.abc import Iterator

from parallel.schedules.actions import Action, backward, forward
from parallel.schedules.registry import schedule
from parallel.schedules.table import Schedule, round_robin


@schedule(
    "interleaved",
    idle="(p - 1) * (F + B) / v",
    in_flight="min(M * v, 2 * (p - r - 1) + (v - 1) * p + 1)",
    chunks=2,
    any_chunks=True,
)
def interleaved(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Each rank has several chunks of the model, so that the pipeline fills and empties in steps of a chunk.

    Micro-batches go in groups of p through all chunks of a rank, forward from the first chunk, backward from the last
    (section 2.2.2 of arXiv 2104.04473). Rank r runs 2·(p − r − 1) + (v − 1)·p chunks forward ahead, then one forward and one
    backward in turn. Raises ValueError unless p divides M.
    """
    if micro_batches % ranks:
        below = micro_batches // ranks * ranks
        fitting = f"{below} or {below + ranks}" if below else str(ranks)
        raise ValueError(
            f"interleaved: the number of micro-batches must be a multiple of the {ranks} ranks, such as {fitting}; got {micro_batches}"
        )
    total = micro_batches * chunks

    def place(number: int) -> tuple[int, int]:
        """Micro-batch and chunk of the forward that comes so far in the row."""
        group, within = divmod(number, ranks * chunks)
        chunk, micro_batch = divmod(within, ranks)
        return group * ranks + micro_batch, chunk

    def row(rank: int) -> Iterator[Action]:
        ahead = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, total)
        for number in range(ahead):
            yield forward(*place(number))
        for number in range(total):
            if ahead + number < total:
                yield forward(*place(ahead + number))
            micro_batch, chunk = place(number)
            yield backward(micro_batch, chunks - 1 - chunk)

    rows = tuple(tuple(row(rank)) for rank in range(ranks))
    return Schedule("interleaved", ranks, chunks, micro_batches, rows, round_robin(ranks, chunks))
