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


def all_reduce_from(reduce_scatter: Schedule, all_gather: Schedule, name: str) -> Schedule:
    """all_reduce = reduce_scatter, then all_gather: the one block of all_reduce is cut into as many chunks as there are ranks.

    Chunk r is block r of both parts. Where the first part keeps the partial sum of block c in `tmp[c]`, that lives in
    `out[c]`, which the second part overwrites, so that nothing is allocated.
    """
    size = reduce_scatter.size
    partial_sums = tuple(Ref("in", block) for block in range(size))

    def program(rank: int) -> Iterator[Row]:
        own, in_out = Ref("out", rank), tuple(reduce_scatter.scratch(rank)) == partial_sums

        def first(ref: Ref) -> Ref:
            moved = replace(ref, buffer="out") if in_out else ref
            return own if ref.buffer == "out" else moved if ref.buffer == "tmp" else ref

        rows = [renamed(row, first) for row in reduce_scatter.program(rank)]
        rows += [renamed(row, lambda ref: own if ref.buffer == "in" else ref) for row in all_gather.program(rank)]
        yield from (row for row in rows if row)

    def scratch(rank: int) -> tuple[Ref, ...]:
        chunks = tuple(reduce_scatter.scratch(rank))
        return () if chunks == partial_sums else tuple(Ref("out", rank) if c.buffer == "out" else c for c in chunks)

    return Schedule("all_reduce", name, size, program, pieces=size, scratch=scratch)
