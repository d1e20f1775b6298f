"""The proof that a pipeline schedule trains: everything exactly once, in an order that the ranks can keep."""

from __future__ import annotations

from itertools import accumulate

from parallel.schedules.actions import Action, Kind
from parallel.schedules.errors import ScheduleError
from parallel.schedules.table import Schedule
from parallel.schedules.timing import run

_NOTHING, _FORWARD, _HALF, _DONE = range(4)
_STATES = ("nothing", "its forward", "the input half of its backward", "all of it")
_TRANSITIONS = {
    Kind.FORWARD: (_NOTHING, _FORWARD),
    Kind.BACKWARD: (_FORWARD, _DONE),
    Kind.INPUT_GRADIENT: (_FORWARD, _HALF),
    Kind.WEIGHT_GRADIENT: (_HALF, _DONE),
}
"""Kind → what a micro-batch must have had in a chunk before, and has had after."""


def verify(schedule: Schedule) -> None:
    """Prove that a schedule is right; raises ScheduleError with the rank, the position and the action of the first fault.

    Every micro-batch goes forward and backward through every virtual stage exactly once, its weight half, where it is split,
    after its input half. When every rank executes its row in order, with sends that never block and receives that wait, all
    come to the end.
    """
    _check_places(schedule)
    for rank, row in enumerate(schedule.rows):
        _check_row(schedule, rank, row)
    run(schedule)


def most_in_flight(schedule: Schedule, rank: int) -> int:
    """The most micro-batches, counted in each chunk, whose forward has run on a rank and whose last half of backward has not."""
    change = {Kind.FORWARD: 1, Kind.INPUT_GRADIENT: 0}
    return max(accumulate(change.get(action.kind, -1) for action in schedule.rows[rank]))


def _check_places(schedule: Schedule) -> None:
    ranks, chunks, places = schedule.ranks, schedule.chunks, schedule.places
    if min(ranks, chunks, schedule.micro_batches) < 1:
        raise ScheduleError(f"impossible: {ranks} ranks, {chunks} chunks, {schedule.micro_batches} micro-batches")
    if len(schedule.rows) != ranks:
        raise ScheduleError(f"there are {len(schedule.rows)} rows for {ranks} ranks")
    wanted = {(rank, chunk) for rank in range(ranks) for chunk in range(chunks)}
    for stage, (rank, chunk) in enumerate(places):
        if (rank, chunk) not in wanted:
            raise ScheduleError(f"virtual stage {stage} is at chunk {chunk}, which is taken, or is not there", rank)
        wanted.remove((rank, chunk))
    if wanted:
        rank, chunk = min(wanted)
        raise ScheduleError(f"chunk {chunk} is no virtual stage", rank)


def _check_row(schedule: Schedule, rank: int, row: tuple[Action, ...]) -> None:
    states = [[_NOTHING] * schedule.micro_batches for _ in range(schedule.chunks)]
    for position, action in enumerate(row):
        if not (0 <= action.chunk < schedule.chunks and 0 <= action.micro_batch < schedule.micro_batches):
            raise ScheduleError(
                f"there are chunks 0 to {schedule.chunks - 1} and micro-batches 0 to {schedule.micro_batches - 1}",
                rank, position, action,
            )  # fmt: skip
        before, after = _TRANSITIONS[action.kind]
        found = states[action.chunk][action.micro_batch]
        if found != before:
            raise ScheduleError(
                f"the micro-batch must have had {_STATES[before]} in this chunk, and has had {_STATES[found]}",
                rank, position, action,
            )  # fmt: skip
        states[action.chunk][action.micro_batch] = after
    for chunk, column in enumerate(states):
        for micro_batch, state in enumerate(column):
            if state != _DONE:
                raise ScheduleError(
                    f"micro-batch {micro_batch} ends with {_STATES[state]} in chunk {chunk}; the rest is missing", rank
                )
