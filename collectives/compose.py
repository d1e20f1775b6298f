"""Schedules made of schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from collectives.schedule import Instruction, Kind, Ref, Row, Schedule

Rename = Callable[[Ref], Ref]


def renamed(row: Row, rename: Rename) -> Row:
    """The row with every reference renamed; a copy onto itself disappears."""
    instructions = (
        Instruction(i.kind, i.peer, i.source and rename(i.source), i.target and rename(i.target)) for i in row
    )
    return tuple(i for i in instructions if not (i.kind is Kind.COPY and i.source == i.target))


def all_reduce_from(reduce_scatter: Schedule, all_gather: Schedule) -> Schedule:
    """all_reduce = reduce_scatter, then all_gather: the one block of all_reduce is cut into as many chunks as there are ranks.

    Chunk r is block r of both parts. The partial sums that the first part keeps in `tmp[c]` live in `out[c]`, which the
    second part overwrites, so that nothing is allocated.
    """

    def program(rank: int) -> Iterator[Row]:
        own = Ref("out", rank)
        for row in reduce_scatter.program(rank):
            yield renamed(
                row,
                lambda ref: own if ref.buffer == "out" else replace(ref, buffer="out") if ref.buffer == "tmp" else ref,
            )
        for row in all_gather.program(rank):
            yield renamed(row, lambda ref: own if ref.buffer == "in" else ref)

    return Schedule("all_reduce", reduce_scatter.algorithm, reduce_scatter.size, program, pieces=reduce_scatter.size)
