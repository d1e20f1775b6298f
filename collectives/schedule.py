"""A schedule: the frozen table of steps that a collective algorithm returns.

Each rank has a program, a sequence of rows. The instructions of one row are independent of each other and start together;
what they read is as it was when the row began. The next row begins when all of them are done: a message is done when its
sender and its receiver have met. That strict reading is what the verifier proves. An engine may run ahead of it, slice by
slice, as long as it keeps the order of messages between two ranks and never reads or overwrites a slice too early.

Data is named, never counted: `in`, `out` and `tmp` are made of blocks (see `spec`), every block is cut evenly into `pieces`
chunks, and `Ref("out", 3)` is chunk 3. So one schedule serves any number of elements, uneven and empty blocks included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Literal

Buffer = Literal["in", "out", "tmp"]


class Kind(Enum):
    """The whole instruction set."""

    SEND = "send"
    RECV = "recv"
    RECV_REDUCE = "recv_reduce"
    COPY = "copy"
    REDUCE = "reduce"
    FOLD = "fold"


@dataclass(frozen=True, slots=True)
class Ref:
    """`count` neighbouring chunks of a buffer, beginning with `chunk`."""

    buffer: Buffer
    chunk: int
    count: int = 1

    def __str__(self) -> str:
        last = f":{self.chunk + self.count}" if self.count != 1 else ""
        return f"{self.buffer}[{self.chunk}{last}]"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One thing that a rank does; make it with `send`, `recv`, `recv_reduce`, `copy`, `reduce` or `fold`."""

    kind: Kind
    peer: int | None
    source: Ref | None
    target: Ref | None

    def __str__(self) -> str:
        match self.kind:
            case Kind.SEND:
                return f"{self.source} → {self.peer}"
            case Kind.RECV:
                return f"{self.target} ← {self.peer}"
            case Kind.RECV_REDUCE:
                return f"{self.target} ← {self.peer} ⊕ {self.source}"
            case Kind.COPY:
                return f"{self.target} = {self.source}"
            case Kind.REDUCE:
                return f"{self.target} ⊕= {self.source}"
            case Kind.FOLD:
                return f"{self.target} = ⊕ {self.source}"


def send(peer: int, source: Ref) -> Instruction:
    """Send `source` to `peer`."""
    return Instruction(Kind.SEND, peer, source, None)


def recv(peer: int, target: Ref) -> Instruction:
    """Receive from `peer` into `target`."""
    return Instruction(Kind.RECV, peer, None, target)


def recv_reduce(peer: int, source: Ref, target: Ref) -> Instruction:
    """`target` = what arrives from `peer` ⊕ `source`."""
    return Instruction(Kind.RECV_REDUCE, peer, source, target)


def copy(source: Ref, target: Ref) -> Instruction:
    """`target` = `source`, on this rank."""
    return Instruction(Kind.COPY, None, source, target)


def reduce(source: Ref, target: Ref) -> Instruction:
    """`target` = `target` ⊕ `source`, on this rank."""
    return Instruction(Kind.REDUCE, None, source, target)


def fold(source: Ref, target: Ref) -> Instruction:
    """`target` = the chunks of `source` reduced from the first to the last, on this rank; all are as large as `target`.

    16-bit floats are rounded once, at the end, which no sequence of `reduce` can do.
    """
    return Instruction(Kind.FOLD, None, source, target)


Row = tuple[Instruction, ...]
Program = tuple[Row, ...]


def _no_scratch(rank: int) -> Sequence[Ref]:
    return ()


@dataclass(frozen=True)
class Schedule:
    """The programs of all ranks of one collective; `program(rank)` makes one when it is asked for, and keeps it.

    `pieces` is the number of chunks that every block is cut into; chunk i of a rank's `tmp` is as large as the chunk
    `scratch(rank)[i]` of its `in` or `out`. With `even` all blocks must have the same element count.
    """

    collective: str
    algorithm: str
    size: int
    make_program: Callable[[int], Iterable[Row]] = field(repr=False, compare=False)
    root: int = 0
    pieces: int = 1
    scratch: Callable[[int], Sequence[Ref]] = field(default=_no_scratch, repr=False, compare=False)
    even: bool = False

    @cached_property
    def _programs(self) -> dict[int, Program]:
        return {}

    def program(self, rank: int) -> Program:
        """The rows of one rank; rows in which it does nothing are left out at the end, kept in between."""
        if rank not in self._programs:
            rows = list(self.make_program(rank))
            while rows and not rows[-1]:
                rows.pop()
            self._programs[rank] = tuple(rows)
        return self._programs[rank]

    @property
    def programs(self) -> tuple[Program, ...]:
        """Every rank's program."""
        return tuple(self.program(rank) for rank in range(self.size))

    @property
    def steps(self) -> int:
        """The number of rows of the longest program."""
        return max((len(program) for program in self.programs), default=0)

    def __str__(self) -> str:
        """The table: one line a step, one column a rank."""
        cells = [["step", *(f"rank {rank}" for rank in range(self.size))]]
        for step in range(self.steps):
            row = (", ".join(map(str, program[step])) if step < len(program) else "" for program in self.programs)
            cells.append([str(step), *row])
        widths = [max(len(line[column]) for line in cells) for column in range(self.size + 1)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        root = f", root {self.root}" if self.root else ""
        head = f"{self.collective} by {self.algorithm}, {self.size} ranks{root}, {self.pieces} chunk{'s' * (self.pieces > 1)} a block"
        return "\n".join((head, lines[0], "  ".join("─" * width for width in widths), *lines[1:]))
