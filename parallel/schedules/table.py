"""A pipeline schedule: the frozen table of what every rank does, in its order.

The model is cut into virtual stages, one after the other; `places` says which chunk of which rank each of them is. A rank needs
no more than its row: an activation goes to the place of the next stage, a gradient to the place of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from parallel.schedules.actions import Action, Kind
from parallel.schedules.timing import run

Places = tuple[tuple[int, int], ...]
"""(rank, chunk) of each virtual stage."""


def round_robin(ranks: int, chunks: int = 1) -> Places:
    """The places of stages that go round the ranks: stage s is chunk s // ranks of rank s % ranks."""
    return tuple((stage % ranks, stage // ranks) for stage in range(ranks * chunks))


@dataclass(frozen=True)
class Schedule:
    """The rows of all ranks; it prints as a table, one line a rank, time from left to right at unit costs.

    A column is a forward, or one of the halves of backward, of one chunk: `F3` of micro-batch 3, `F3.1` through chunk 1 where
    there are several. Both halves at once take two columns; a point is a column in which the rank waits.
    """

    name: str
    ranks: int
    chunks: int
    micro_batches: int
    rows: tuple[tuple[Action, ...], ...]
    places: Places

    @cached_property
    def _stages(self) -> dict[tuple[int, int], int]:
        return {place: stage for stage, place in enumerate(self.places)}

    def stage(self, rank: int, chunk: int) -> int:
        """The virtual stage that a rank's chunk is."""
        return self._stages[rank, chunk]

    def __str__(self) -> str:
        def label(action: Action) -> str:
            return str(action) if self.chunks > 1 else str(action).partition(".")[0]

        width = max(len(label(action)) for row in self.rows for action in row)
        count = f", {self.chunks} chunks each" if self.chunks > 1 else ""
        lines = [f"{self.name}, {_plural(self.ranks, 'rank')}{count}, {_plural(self.micro_batches, 'micro-batch')}"]
        for rank, (row, spans) in enumerate(zip(self.rows, run(self), strict=True)):
            cells: list[str] = []
            clock = 0
            for action, (begin, end) in zip(row, spans, strict=True):
                cells += [".".ljust(width)] * (begin - clock)
                filled = "-" if action.kind is Kind.BACKWARD else " "
                cells.append(label(action).ljust((width + 1) * (end - begin) - 1, filled))
                clock = end
            lines.append(f"rank {rank:<{len(str(self.ranks - 1))}}  {' '.join(cells)}".rstrip())
        return "\n".join(lines)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 'es' if what.endswith('ch') else 's'}"
