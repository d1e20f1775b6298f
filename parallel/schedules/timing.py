"""When every action of a schedule begins and ends, at given costs: the planned timeline."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING

from parallel.schedules.actions import Action, Kind
from parallel.schedules.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parallel.schedules.table import Schedule

Cost = int | float | Fraction
Exact = int | Fraction
Span = tuple[Exact, Exact]
"""Begin and end of an action."""

_Arrivals = list[int | None]
_Step = tuple[_Arrivals, int, _Arrivals | None]


@dataclass(frozen=True)
class Times:
    """The planned timeline: `rows[rank][position]` is the begin and the end of that action.

    Idle time has one convention here, that of the zero-bubble paper (arXiv 2401.10241): the `period`, which is the longest
    time from the first to the last action of any rank, less the rank's own work. It is what a rank waits in each step when
    step follows step and no rank waits for all others in between. The `total`, to the end of the last rank, is the period
    wherever a rank that begins first also ends last. In ZB-V the ranks begin and end staggered: a barrier after each step costs
    total − period on top.
    """

    rows: tuple[tuple[Span, ...], ...]

    @property
    def total(self) -> Exact:
        """The time from the beginning of the first action until the last rank has finished."""
        return max(row[-1][1] for row in self.rows)

    @cached_property
    def period(self) -> Exact:
        """The longest time from a rank's first action to its last, both included."""
        return max(row[-1][1] - row[0][0] for row in self.rows)

    def work(self, rank: int) -> Exact:
        """The time in which the rank computes."""
        return sum(end - begin for begin, end in self.rows[rank])

    def idle(self, rank: int) -> Exact:
        """The period less the rank's work."""
        return self.period - self.work(rank)


class _Run:
    """Every rank executes its row in order: sends never block, receives wait. Times are whole numbers."""

    def __init__(self, schedule: Schedule, costs: dict[Kind, int], send: int) -> None:
        self.schedule, self.costs = schedule, costs
        self.spans: list[list[tuple[int, int]]] = [[] for _ in schedule.rows]
        # When a stage's output, and the gradient of its input, is there: [stage][micro-batch].
        self.outputs: list[list[int | None]] = [[None] * schedule.micro_batches for _ in schedule.places]
        self.gradients: list[list[int | None]] = [[None] * schedule.micro_batches for _ in schedule.places]
        self.steps = [
            [self._steps(schedule.stage(rank, chunk), send) for chunk in range(schedule.chunks)]
            for rank in range(schedule.ranks)
        ]

    def _steps(self, stage: int, send: int) -> dict[Kind, _Step]:
        """What each kind of action waits for in a stage, how long that travels, and what the action makes."""
        places, last = self.schedule.places, len(self.schedule.places) - 1

        def travel(source: int) -> int:
            return send if places[source][0] != places[stage][0] else 0

        at_once: _Arrivals = [0] * self.schedule.micro_batches
        before, after = (at_once, 0), (self.outputs[stage], 0)
        if stage > 0:
            before = self.outputs[stage - 1], travel(stage - 1)
        if stage < last:
            after = self.gradients[stage + 1], travel(stage + 1)
        return {
            Kind.FORWARD: (*before, self.outputs[stage]),
            Kind.BACKWARD: (*after, self.gradients[stage]),
            Kind.INPUT_GRADIENT: (*after, self.gradients[stage]),
            Kind.WEIGHT_GRADIENT: (self.gradients[stage], 0, None),
        }

    def _advance(self, rank: int, row: Sequence[Action]) -> bool:
        """Execute what the rank can; returns whether that was anything."""
        spans, steps, costs = self.spans[rank], self.steps[rank], self.costs
        first = len(spans)
        clock = spans[-1][1] if spans else 0
        for position in range(first, len(row)):
            action = row[position]
            awaited, travel, made = steps[action.chunk][action.kind]
            there = awaited[action.micro_batch]
            if there is None:
                break
            begin = max(clock, there + travel)
            clock = begin + costs[action.kind]
            spans.append((begin, clock))
            if made is not None:
                made[action.micro_batch] = clock
        return len(spans) > first

    def run(self) -> None:
        """Go round the ranks until nothing moves; raise ScheduleError unless all rows are done."""
        rows = self.schedule.rows
        while sum(self._advance(rank, row) for rank, row in enumerate(rows)):
            pass
        stuck = [(rank, position) for rank, position in enumerate(map(len, self.spans)) if position < len(rows[rank])]
        if stuck:
            waiting = "; ".join(self._waiting(rank, rows[rank][position]) for rank, position in stuck[:6])
            rank, position = stuck[0]
            raise ScheduleError(f"deadlock: {waiting}", rank, position, rows[rank][position])

    def _waiting(self, rank: int, action: Action) -> str:
        places, stage = self.schedule.places, self.schedule.stage(rank, action.chunk)
        source = stage - 1 if action.kind is Kind.FORWARD else stage + 1
        return f"rank {rank} waits with {action} for stage {source} of rank {places[source % len(places)][0]}"


def run(
    schedule: Schedule, forward: int = 1, input_gradient: int = 1, weight_gradient: int = 1, send: int = 0
) -> list[list[tuple[int, int]]]:
    """Execute the rows at whole costs, given per chunk; returns begin and end of every action, [rank][position].

    Raises ScheduleError for a deadlock, with the first rank that is stuck.
    """
    costs = {
        Kind.FORWARD: forward,
        Kind.BACKWARD: input_gradient + weight_gradient,
        Kind.INPUT_GRADIENT: input_gradient,
        Kind.WEIGHT_GRADIENT: weight_gradient,
    }
    execution = _Run(schedule, costs, send)
    execution.run()
    return execution.spans


def times(
    schedule: Schedule, forward: Cost = 1, input_gradient: Cost = 1, weight_gradient: Cost = 1, send: Cost = 0
) -> Times:
    """Return the planned timeline of a schedule that `verify` accepts.

    Costs are those of a micro-batch on a rank, all its chunks together, in any unit: a chunk takes its share, so that a rank's
    work does not depend on the number of chunks. `send` is added to what crosses from one rank to another. Times are exact:
    whole numbers where they are, fractions otherwise. Raises ValueError for a negative cost.
    """
    given = [Fraction(cost) for cost in (forward, input_gradient, weight_gradient, send)]
    if min(given) < 0:
        raise ValueError(f"costs must not be negative; got {', '.join(map(str, given))}")
    *halves, crossing = given
    shares = [*(cost / schedule.chunks for cost in halves), crossing]
    scale = lcm(*(share.denominator for share in shares))
    rows = run(schedule, *(int(share * scale) for share in shares))
    if scale == 1:
        return Times(tuple(map(tuple, rows)))
    return Times(tuple(tuple((Fraction(begin, scale), Fraction(end, scale)) for begin, end in row) for row in rows))
