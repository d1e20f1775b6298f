"""The proof that a schedule does what its collective means.

The schedule is run on symbols, strictly: rows one after the other, a message done when sender and receiver have met. Every
chunk holds a reduction tree over contributions, so that the proof counts each contribution (a union would hide one that is
added twice) and sees the order of reduction: two ranks that end with the same chunk must have reduced it in the same order,
up to swapping the two sides of an addition, which is what makes results bit-identical on all ranks. A fold is a node of its
own kind, because it rounds once; the proof says whether every result is the fold of its contributions in rank order.

Found, with rank, step and chunk: wrong, missing, doubled contributions; chunks read before they are written; two writes, or
a read and a write, of one chunk in one row; writes to the caller's input; messages that nobody receives or sends; deadlock;
sizes that do not fit when blocks are uneven.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from collectives.algorithms import Algorithm
from collectives.errors import ScheduleError
from collectives.schedule import Instruction, Kind, Ref, Schedule
from collectives.spec import COLLECTIVES, SizeKey

Location = tuple[str, int]
"""(buffer, chunk); in place, chunks of `in` that share memory with `out` go under their `out` name."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What the run on symbols counted."""

    messages: int
    """Messages over all ranks, unsliced."""
    chunks_sent: tuple[int, ...]
    """Chunks sent by each rank; times the chunk's bytes, the traffic."""
    steps: int
    """Rows of the longest program."""
    rank_ordered: bool
    """Whether every result is one fold of its contributions in the order of the ranks, whatever the sizes."""


class _Values:
    """Reduction trees, interned: equal trees (up to swapped operands) have equal numbers."""

    def __init__(self) -> None:
        self._numbers: dict[object, int] = {}
        self._contributions: list[Counter[tuple[int, int, int]]] = []

    def leaf(self, rank: int, block: int, piece: int) -> int:
        return self._number((rank, block, piece), Counter([(rank, block, piece)]))

    def reduced(self, left: int, right: int) -> int:
        key = frozenset((left, right)) if left != right else (left, right)
        if key not in self._numbers:
            return self._number(key, self._contributions[left] + self._contributions[right])
        return self._numbers[key]

    def folded(self, values: Sequence[int]) -> int:
        if len(values) == 1:
            return values[0]
        if len(values) == 2:
            return self.reduced(values[0], values[1])
        key = ("fold", tuple(values))
        if key not in self._numbers:
            return self._number(key, sum((self._contributions[value] for value in values), Counter()))
        return self._numbers[key]

    def contributions(self, value: int) -> Counter[tuple[int, int, int]]:
        return self._contributions[value]

    def _number(self, key: object, contributions: Counter[tuple[int, int, int]]) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self._contributions)
            self._contributions.append(contributions)
        return self._numbers[key]


@dataclass(slots=True)
class _Message:
    """One send or receive of the current row that waits for the other side."""

    rank: int
    step: int
    instruction: Instruction
    values: list[int] | None
    sizes: list[tuple[SizeKey, int]]


@dataclass(slots=True)
class _RankState:
    memory: dict[Location, int] = field(default_factory=dict)
    step: int = 0
    unmatched: int = 0
    writes: list[tuple[Location, int]] = field(default_factory=list)
    started: bool = False


class _Run:
    """One symbolic run, with input and output in separate memory or in place."""

    def __init__(self, schedule: Schedule, in_place: bool) -> None:
        self.schedule, self.in_place = schedule, in_place
        self.spec = COLLECTIVES[schedule.collective]
        self.values = _Values()
        self.ranks = [_RankState() for _ in range(schedule.size)]
        self.sends: dict[tuple[int, int], deque[_Message]] = {}
        self.receives: dict[tuple[int, int], deque[_Message]] = {}
        self.messages = 0
        self.chunks_sent = [0] * schedule.size
        self.rank_ordered = True
        self.scratch = [tuple(schedule.scratch(rank)) for rank in range(schedule.size)]
        for rank, state in enumerate(self.ranks):
            for block in range(self.spec.input_blocks(schedule.size, rank, schedule.root)):
                for piece in range(schedule.pieces):
                    location = self.locate(rank, "in", block * schedule.pieces + piece)
                    state.memory[location] = self.values.leaf(rank, block, piece)

    # Names, sizes and bounds of chunks

    def locate(self, rank: int, buffer: str, chunk: int) -> Location:
        shared = self.spec.in_place(self.schedule.size, rank, self.schedule.root) if self.in_place else None
        if buffer == "in" and shared is not None:
            pieces, (first_out, first_in) = self.schedule.pieces, shared
            moved = chunk + (first_out - first_in) * pieces
            if 0 <= moved < pieces * self.blocks(rank, "out"):
                return ("out", moved)
        return (buffer, chunk)

    def blocks(self, rank: int, buffer: str) -> int:
        count = self.spec.input_blocks if buffer == "in" else self.spec.output_blocks
        return count(self.schedule.size, rank, self.schedule.root)

    def size(self, rank: int, buffer: str, chunk: int) -> tuple[SizeKey, int]:
        if buffer == "tmp":
            like = self.scratch[rank][chunk]
            return self.size(rank, like.buffer, like.chunk)
        block, piece = divmod(chunk, self.schedule.pieces)
        key = self.spec.input_size if buffer == "in" else self.spec.output_size
        return () if self.schedule.even else key(rank, block), piece

    def chunks(self, rank: int, step: int, ref: Ref) -> list[Location]:
        available = len(self.scratch[rank])
        if ref.buffer != "tmp":
            available = self.blocks(rank, ref.buffer) * self.schedule.pieces
        if ref.count < 1 or ref.chunk < 0 or ref.chunk + ref.count > available:
            raise ScheduleError(f"the buffer has {available} chunks here", rank, step, str(ref))
        return [self.locate(rank, ref.buffer, chunk) for chunk in range(ref.chunk, ref.chunk + ref.count)]

    def sizes(self, rank: int, ref: Ref) -> list[tuple[SizeKey, int]]:
        return [self.size(rank, ref.buffer, chunk) for chunk in range(ref.chunk, ref.chunk + ref.count)]

    def read(self, rank: int, step: int, ref: Ref) -> list[int]:
        found = []
        for location in self.chunks(rank, step, ref):
            if location not in self.ranks[rank].memory:
                raise ScheduleError("read before anything was written there", rank, step, _name(location))
            found.append(self.ranks[rank].memory[location])
        return found

    # Rows

    def start_row(self, rank: int) -> None:
        """Check the row for hazards, read what it reads, post its messages."""
        state, program = self.ranks[rank], self.schedule.program(rank)
        row = program[state.step]
        self._check_hazards(rank, state.step, row)
        state.started, state.unmatched, state.writes = True, 0, []
        for instruction in row:
            step, source, target, peer = state.step, instruction.source, instruction.target, instruction.peer
            if peer is not None and (peer == rank or not 0 <= peer < self.schedule.size):
                raise ScheduleError(f"there is no peer {peer} for this rank", rank, step, str(source or target))
            if source is not None and target is not None:
                copies = source.count if instruction.kind is Kind.FOLD else 1
                if self.sizes(rank, source) != self.sizes(rank, target) * copies:
                    raise ScheduleError(
                        f"{source} and {target} differ in size when blocks are uneven", rank, step, str(target)
                    )
            values = self.read(rank, step, source) if source is not None else None
            if peer is None:
                assert values is not None and target is not None
                if instruction.kind is Kind.REDUCE:
                    values = [
                        self.values.reduced(a, b) for a, b in zip(self.read(rank, step, target), values, strict=True)
                    ]
                elif instruction.kind is Kind.FOLD:
                    values = [self.values.folded(values)]
                state.writes.extend(zip(self.chunks(rank, step, target), values, strict=True))
                continue
            state.unmatched += 1
            ref = source if instruction.kind is Kind.SEND else target
            assert ref is not None
            message = _Message(rank, step, instruction, values, self.sizes(rank, ref))
            if instruction.kind is Kind.SEND:
                self.chunks_sent[rank] += ref.count
                self.sends.setdefault((rank, peer), deque()).append(message)
            else:
                self.receives.setdefault((peer, rank), deque()).append(message)

    def _check_hazards(self, rank: int, step: int, row: tuple[Instruction, ...]) -> None:
        reads: list[tuple[int, Location]] = []
        writes: list[tuple[int, Location]] = []
        for index, instruction in enumerate(row):
            if instruction.source is not None:
                reads.extend((index, location) for location in self.chunks(rank, step, instruction.source))
            if instruction.target is not None:
                if instruction.target.buffer == "in":
                    raise ScheduleError("writes to the caller's input", rank, step, str(instruction.target))
                locations = self.chunks(rank, step, instruction.target)
                if instruction.kind is Kind.COPY and instruction.source is not None:
                    if locations == self.chunks(rank, step, instruction.source):
                        continue  # in place: copied onto itself, which writes nothing
                writes.extend((index, location) for location in locations)
        written = Counter(location for _, location in writes)
        for index, location in writes:
            if written[location] > 1:
                raise ScheduleError("hazard: written twice in one row", rank, step, _name(location))
            if any(other != index and read == location for other, read in reads):
                raise ScheduleError("hazard: read and written in one row", rank, step, _name(location))

    def match(self) -> bool:
        """Let senders and receivers meet, first in first out; returns whether any did."""
        met = False
        for (sender, receiver), outgoing in self.sends.items():
            incoming = self.receives.get((sender, receiver))
            while outgoing and incoming:
                self._deliver(outgoing.popleft(), incoming.popleft())
                met = True
        return met

    def _deliver(self, message: _Message, receive: _Message) -> None:
        target = receive.instruction.target
        assert target is not None and message.values is not None
        if message.sizes != receive.sizes:
            raise ScheduleError(
                f"receives {target}, but rank {message.rank} sends {message.instruction.source} in its step {message.step}: "
                "they differ in size when blocks are uneven", receive.rank, receive.step, str(target),
            )  # fmt: skip
        values = message.values
        if receive.values is not None:
            values = [self.values.reduced(a, b) for a, b in zip(values, receive.values, strict=True)]
        locations = self.chunks(receive.rank, receive.step, target)
        self.ranks[receive.rank].writes.extend(zip(locations, values, strict=True))
        for side in (message, receive):
            self.ranks[side.rank].unmatched -= 1
        self.messages += 1

    def run(self) -> None:
        moving = True
        while moving:
            moving = False
            for rank, state in enumerate(self.ranks):
                while state.step < len(self.schedule.program(rank)):
                    if not state.started:
                        self.start_row(rank)
                        moving = True
                    if state.unmatched:
                        break
                    state.memory.update(state.writes)
                    state.step, state.started = state.step + 1, False
                    moving = True
            moving = self.match() or moving
        self._check_finished()

    def _check_finished(self) -> None:
        waiting = [message for queue in (*self.sends.values(), *self.receives.values()) for message in queue]
        if not waiting:
            return
        for message in waiting:
            peer = message.instruction.peer
            assert peer is not None
            if self.ranks[peer].step >= len(self.schedule.program(peer)):
                what = "sends" if message.instruction.kind is Kind.SEND else "receives"
                missing = "receives it" if what == "sends" else "sends it"
                raise ScheduleError(
                    f"unmatched: {what} {message.instruction}, and rank {peer} finishes without one that {missing}",
                    message.rank, message.step, str(message.instruction.source or message.instruction.target),
                )  # fmt: skip
        stuck = "; ".join(f"rank {m.rank} step {m.step}: {m.instruction}" for m in waiting[:6])
        first = waiting[0]
        raise ScheduleError(f"deadlock: {stuck}", first.rank, first.step, None)

    # The result

    def check_result(self) -> None:
        agreed: dict[tuple[tuple[tuple[int, int], ...], int], tuple[int, int]] = {}
        schedule = self.schedule
        for rank, state in enumerate(self.ranks):
            last = max(len(schedule.program(rank)) - 1, 0)
            for block in range(self.blocks(rank, "out")):
                wanted = self.spec.result(schedule.size, rank, schedule.root, block)
                for piece in range(schedule.pieces):
                    location = ("out", block * schedule.pieces + piece)
                    if location not in state.memory:
                        raise ScheduleError("never written", rank, last, _name(location))
                    value = state.memory[location]
                    expected = Counter((source, b, piece) for source, b in wanted)
                    found = self.values.contributions(value)
                    if found != expected:
                        raise ScheduleError(_difference(found, expected), rank, last, _name(location))
                    in_order = [self.values.leaf(source, b, piece) for source, b in wanted]
                    self.rank_ordered = self.rank_ordered and value == self.values.folded(in_order)
                    other, by = agreed.setdefault((wanted, piece), (value, rank))
                    if other != value:
                        raise ScheduleError(f"reduced in another order than on rank {by}", rank, last, _name(location))
            if not self.in_place:
                self._check_input_kept(rank, last)

    def _check_input_kept(self, rank: int, last: int) -> None:
        for chunk in range(self.blocks(rank, "in") * self.schedule.pieces):
            block, piece = divmod(chunk, self.schedule.pieces)
            if self.ranks[rank].memory["in", chunk] != self.values.leaf(rank, block, piece):
                raise ScheduleError("the caller's input was changed", rank, last, f"in[{chunk}]")


def _name(location: Location) -> str:
    return f"{location[0]}[{location[1]}]"


def _difference(found: Counter[tuple[int, int, int]], expected: Counter[tuple[int, int, int]]) -> str:
    """Which contributions are missing, and which are too many."""

    def listed(items: Counter[tuple[int, int, int]]) -> str:
        return ", ".join(
            f"block {b} piece {p} of rank {r}" + (f" ×{n}" if n > 1 else "") for (r, b, p), n in sorted(items.items())
        )

    missing, extra = expected - found, found - expected
    parts = [f"missing {listed(missing)}"] if missing else []
    if extra:
        parts.append(f"too many: {listed(extra)}")
    return "; ".join(parts)


def verify(schedule: Schedule, *, in_place: bool = True) -> Proof:
    """Prove the schedule, with input and output apart and, unless `in_place` is False, in the same memory as well.

    Returns what was counted; raises ScheduleError with the rank, step and chunk of the first fault.
    """
    if schedule.size < 1 or not 0 <= schedule.root < schedule.size or schedule.pieces < 1:
        raise ScheduleError(f"impossible: {schedule.size} ranks, root {schedule.root}, {schedule.pieces} pieces")
    _check_scratch(schedule)
    for aliased in (False, True) if in_place else (False,):
        run = _Run(schedule, aliased)
        run.run()
        run.check_result()
    return Proof(run.messages, tuple(run.chunks_sent), schedule.steps, run.rank_ordered)


def _check_scratch(schedule: Schedule) -> None:
    spec = COLLECTIVES[schedule.collective]
    for rank in range(schedule.size):
        blocks = {"in": spec.input_blocks, "out": spec.output_blocks}
        for chunk, ref in enumerate(schedule.scratch(rank)):
            count = blocks[ref.buffer](schedule.size, rank, schedule.root) if ref.buffer in blocks else 0
            if not 0 <= ref.chunk < count * schedule.pieces or ref.count != 1:
                raise ScheduleError(
                    f"made as large as {ref}, which this rank does not have", rank, None, f"tmp[{chunk}]"
                )


def verify_algorithm(entry: Algorithm, size: int) -> Proof:
    """Prove an algorithm for `size` ranks and every root; returns the proof for the last root."""
    roots = range(size) if COLLECTIVES[entry.collective].rooted else range(1)
    for root in roots:
        proof = verify(entry.schedule(size, root), in_place=entry.in_place)
    return proof
