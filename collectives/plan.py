"""One rank's program made ready to run: spans of elements, cut into slices, with what each slice waits for.

A schedule speaks of chunks and of rows that follow each other. A plan knows the counts, cuts every transfer into slices, and
keeps of the rows only what matters: a slice waits for the earlier slices that write what it reads, or that read or write
what it writes. So slice k of a chunk is forwarded as soon as slice k has been reduced, while slice k + 1 is on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from collectives.schedule import Instruction, Kind, Ref, Schedule
from collectives.spec import COLLECTIVES

Cell = tuple[str, int]
"""The smallest unit of dependence: (buffer, first element) of one slice of one chunk."""


@dataclass(frozen=True, slots=True)
class Span:
    """Elements `start` to `stop` of a buffer."""

    buffer: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Task:
    """One slice of one instruction; `step` is its row, `waits` the number of tasks that must be done before it."""

    kind: Kind
    peer: int | None
    source: Span | None
    target: Span | None
    step: int
    waits: int
    dependents: tuple[int, ...]
    contributions: int = 1
    """Of a fold: how many spans it reads; `source` is the first, every other begins `stride` elements after the last."""
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The tasks in program order, and for every peer its sends and its receives in the order of the wire."""

    tasks: tuple[Task, ...]
    sends: dict[int, tuple[int, ...]]
    receives: dict[int, tuple[int, ...]]
    local: tuple[int, ...]
    scratch_elements: int


class _Layout:
    """Where the chunks of each buffer lie, in elements."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        input_counts: Sequence[int],
        output_counts: Sequence[int],
        slice_elements: int,
        in_place: bool,
    ) -> None:
        self.slice_elements = slice_elements
        counts = {"in": input_counts, "out": output_counts}
        self.offsets = {buffer: _chunk_offsets(blocks, schedule.pieces) for buffer, blocks in counts.items()}
        scratch = (self.elements(ref) for ref in schedule.scratch(rank))
        self.offsets["tmp"] = list(accumulate(scratch, initial=0))
        self.shift: int | None = None
        shared = COLLECTIVES[schedule.collective].in_place(schedule.size, rank, schedule.root) if in_place else None
        if shared is not None:
            first_output, first_input = (block * schedule.pieces for block in shared)
            self.shift = self.offsets["out"][first_output] - self.offsets["in"][first_input]

    def elements(self, ref: Ref) -> int:
        """How many elements the reference stands for."""
        offsets = self.offsets[ref.buffer]
        return offsets[ref.chunk + ref.count] - offsets[ref.chunk]

    def slices(self, ref: Ref) -> Iterator[tuple[Span, list[Cell]]]:
        """The reference cut into slices; neighbouring chunks smaller than a slice go together."""
        offsets = self.offsets[ref.buffer]
        start = stop = offsets[ref.chunk]
        cells: list[Cell] = []
        for chunk in range(ref.chunk, ref.chunk + ref.count):
            for first in range(offsets[chunk], offsets[chunk + 1], self.slice_elements):
                last = min(first + self.slice_elements, offsets[chunk + 1])
                if cells and last - start > self.slice_elements:
                    yield Span(ref.buffer, start, stop), cells
                    start, cells = first, []
                stop = last
                cells.append(self._cell(ref.buffer, first))
        if cells:
            yield Span(ref.buffer, start, stop), cells

    def _cell(self, buffer: str, first: int) -> Cell:
        if buffer == "in" and self.shift is not None and 0 <= first + self.shift < self.offsets["out"][-1]:
            return ("out", first + self.shift)
        return (buffer, first)


def _chunk_offsets(blocks: Sequence[int], pieces: int) -> list[int]:
    sizes = (count // pieces + (piece < count % pieces) for count in blocks for piece in range(pieces))
    return list(accumulate(sizes, initial=0))


def compile_plan(
    schedule: Schedule,
    rank: int,
    input_counts: Sequence[int],
    output_counts: Sequence[int],
    slice_elements: int,
    *,
    in_place: bool = False,
) -> Plan:
    """The plan of `rank`, for blocks of these element counts.

    A block of n elements is cut into `schedule.pieces` chunks, the first n mod pieces of which have one element more; empty
    chunks cost nothing. `in_place`: input and output share memory as the collective's spec says.
    """
    if schedule.even and len({*input_counts, *output_counts}) > 1:
        raise ValueError(
            f"{schedule.collective} by {schedule.algorithm} needs blocks of equal counts, "
            f"got {tuple(input_counts)} and {tuple(output_counts)}"
        )
    layout = _Layout(schedule, rank, input_counts, output_counts, slice_elements, in_place)
    drafts: list[tuple[Instruction, Span | None, Span | None, int]] = []
    waits: list[set[int]] = []
    writer: dict[Cell, int] = {}
    readers: dict[Cell, list[int]] = {}
    for step, row in enumerate(schedule.program(rank)):
        for instruction in row:
            for source, read, target, written in _paired_slices(layout, instruction):
                if instruction.kind is Kind.COPY and read == written:
                    continue
                task = len(drafts)
                needs = {writer[cell] for cell in read if cell in writer}
                for cell in written:
                    needs.update(readers.pop(cell, ()))
                    if cell in writer:
                        needs.add(writer[cell])
                    writer[cell] = task
                for cell in read:
                    readers.setdefault(cell, []).append(task)
                needs.discard(task)
                drafts.append((instruction, source, target, step))
                waits.append(needs)
    dependents: list[list[int]] = [[] for _ in drafts]
    for task, needs in enumerate(waits):
        for needed in needs:
            dependents[needed].append(task)
    tasks = tuple(
        Task(
            instruction.kind, instruction.peer, source, target, step, len(waits[task]), tuple(dependents[task]),
            *_contributions(layout, instruction),
        )
        for task, (instruction, source, target, step) in enumerate(drafts)
    )  # fmt: skip
    return Plan(
        tasks,
        _by_peer(tasks, (Kind.SEND,)),
        _by_peer(tasks, (Kind.RECV, Kind.RECV_REDUCE)),
        tuple(index for index, task in enumerate(tasks) if task.peer is None),
        layout.offsets["tmp"][-1],
    )


def elements_sent(schedule: Schedule, rank: int, input_counts: Sequence[int], output_counts: Sequence[int]) -> int:
    """How many elements a rank sends, for blocks of these element counts."""
    layout = _Layout(schedule, rank, input_counts, output_counts, 1, False)
    return sum(
        layout.elements(instruction.source)
        for row in schedule.program(rank)
        for instruction in row
        if instruction.kind is Kind.SEND and instruction.source is not None
    )


def _contributions(layout: _Layout, instruction: Instruction) -> tuple[int, int]:
    """How many spans the instruction reads, and the distance between them."""
    if instruction.kind is not Kind.FOLD:
        return 1, 0
    assert instruction.source is not None and instruction.target is not None
    return instruction.source.count, layout.elements(instruction.target)


def _paired_slices(
    layout: _Layout, instruction: Instruction
) -> Iterator[tuple[Span | None, list[Cell], Span | None, list[Cell]]]:
    sources = layout.slices(instruction.source) if instruction.source is not None else None
    targets = layout.slices(instruction.target) if instruction.target is not None else None
    if sources is None:
        assert targets is not None
        yield from ((None, [], span, cells) for span, cells in targets)
    elif targets is None:
        yield from ((span, cells, None, []) for span, cells in sources)
    elif instruction.kind is Kind.FOLD:
        assert instruction.source is not None
        buffer, first, count = instruction.source.buffer, instruction.source.chunk, instruction.source.count
        chunks = (layout.slices(Ref(buffer, chunk)) for chunk in range(first, first + count))
        for (target, written), *parts in zip(targets, *chunks, strict=True):
            yield parts[0][0], [cell for _, cells in parts for cell in cells], target, written
    else:
        for (source, read), (target, written) in zip(sources, targets, strict=True):
            yield source, read, target, written


def _by_peer(tasks: Sequence[Task], kinds: tuple[Kind, ...]) -> dict[int, tuple[int, ...]]:
    queues: dict[int, list[int]] = {}
    for index, task in enumerate(tasks):
        if task.peer is not None and task.kind in kinds:
            queues.setdefault(task.peer, []).append(index)
    return {peer: tuple(queue) for peer, queue in queues.items()}
