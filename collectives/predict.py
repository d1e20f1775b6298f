"""How long a schedule takes, by the costs of a link: every message of every rank, without moving a byte.

The rows are walked as the verifier walks them, and every chunk carries two times: when its first slice and when its last is
there. A message begins when the sender's way out, the receiver's way in and the first slice are ready, and ends no sooner
than its own slices take and than the last slice of what it forwards. So a chain of forwards costs what a pipeline costs.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from collectives.costs import LinkCosts
from collectives.schedule import Instruction, Kind, Ref, Schedule
from collectives.spec import COLLECTIVES

Times = tuple[float, float]
"""Seconds from the start of the call until the first slice of a chunk is there, and the last."""


@dataclass(slots=True)
class _Rank:
    chunks: dict[tuple[str, int], Times] = field(default_factory=dict)
    step: int = 0
    unmatched: int = 0
    writes: list[tuple[Ref, Times]] = field(default_factory=list)
    sending: float = 0.0
    """When its way out is free."""
    receiving: float = 0.0
    """When its way in, and its arithmetic, is free."""

    def times(self, ref: Ref) -> Times:
        first = self.chunks.get((ref.buffer, ref.chunk), (0.0, 0.0))[0]
        found = (self.chunks.get((ref.buffer, chunk)) for chunk in range(ref.chunk, ref.chunk + ref.count))
        return first, max(times[1] if times is not None else 0.0 for times in found)


Posted = tuple[int, int, Instruction, Times]
"""(rank, place in its row, instruction, times of what it reads)."""


class _Walk:
    def __init__(self, schedule: Schedule, nbytes: int, costs: LinkCosts, slice_bytes: int) -> None:
        self.schedule, self.costs, self.slice_bytes = schedule, costs, slice_bytes
        self.chunk_bytes = nbytes / (whole_blocks(schedule) * schedule.pieces)
        self.ranks = [_Rank() for _ in range(schedule.size)]
        self.sends: dict[tuple[int, int], deque[Posted]] = defaultdict(deque)
        self.receives: dict[tuple[int, int], deque[Posted]] = defaultdict(deque)
        self.met: list[tuple[float, int, int, Posted, Posted]] = []
        """A heap of messages whose two sides are there: (when it could begin, place in the row, number, send, receive)."""
        self.number = count()

    def run(self) -> float:
        for rank in range(self.schedule.size):
            self._advance(rank)
        while self.met:
            known, place, number, sent, received = heappop(self.met)
            start = self._start_time(sent, received)
            if start > known:  # another message took the way meanwhile
                heappush(self.met, (start, place, number, sent, received))
            else:
                self._deliver(sent, received, start)
                for rank in (sent[0], received[0]):
                    self._done(rank)
                    self._advance(rank)
        ends = (max((last for _, last in state.chunks.values()), default=0.0) for state in self.ranks)
        ports = (max(state.sending, state.receiving) for state in self.ranks)
        return self.costs.call + max(*ends, *ports, 0.0)

    def _advance(self, rank: int) -> None:
        """Begin rows until one has to wait for messages."""
        state, program = self.ranks[rank], self.schedule.program(rank)
        while not state.unmatched and state.step < len(program):
            row, state.step = program[state.step], state.step + 1
            state.unmatched = 1  # keeps the row open while its messages are posted
            for place, instruction in enumerate(row):
                self._start(rank, place, instruction)
            self._done(rank)

    def _start(self, rank: int, place: int, instruction: Instruction) -> None:
        state, source, peer = self.ranks[rank], instruction.source, instruction.peer
        times = state.times(source) if source is not None else (0.0, 0.0)
        if peer is None:
            self._local(state, instruction, times)
            return
        state.unmatched += 1
        posted = (rank, place, instruction, times)
        if instruction.kind is Kind.SEND:
            key, mine, theirs = (rank, peer), self.sends, self.receives
        else:
            key, mine, theirs = (peer, rank), self.receives, self.sends
        if not theirs[key]:
            mine[key].append(posted)
            return
        other = theirs[key].popleft()
        sent, received = (posted, other) if instruction.kind is Kind.SEND else (other, posted)
        heappush(self.met, (self._start_time(sent, received), sent[1], next(self.number), sent, received))

    def _start_time(self, sent: Posted, received: Posted) -> float:
        # Rounded, so that messages that begin together are taken in the order of their rows whatever the last bits say.
        return round(max(self.ranks[sent[0]].sending, self.ranks[received[0]].receiving, sent[3][0]), 10)

    def _done(self, rank: int) -> None:
        """One thing less that the rank's row waits for; what the row writes is there when it waits for nothing."""
        state = self.ranks[rank]
        state.unmatched -= 1
        if state.unmatched == 0:
            for ref, times in state.writes:
                for chunk in range(ref.chunk, ref.chunk + ref.count):
                    state.chunks[ref.buffer, chunk] = times
            state.writes = []

    def _slices(self, ref: Ref) -> tuple[float, int]:
        nbytes = self.chunk_bytes * ref.count
        return nbytes, max(1, -int(-nbytes // self.slice_bytes))

    def _deliver(self, sent: Posted, received: Posted, start: float) -> None:
        (sender, receiver), costs = (self.ranks[sent[0]], self.ranks[received[0]]), self.costs
        target, (own_first, own_last) = received[2].target, received[3]
        assert target is not None
        nbytes, slices = self._slices(target)
        busy = costs.message * slices + costs.byte * nbytes
        reducing = costs.reduced_byte * nbytes if received[2].kind is Kind.RECV_REDUCE else 0.0
        sent_last = max(start + busy, sent[3][1] + busy / slices)
        first = max(start + busy / slices + costs.latency, own_first) + reducing / slices
        last = max(sent_last + costs.latency + reducing / slices, start + busy + costs.latency + reducing, own_last)
        sender.sending = sent_last
        receiver.receiving = last - costs.latency
        receiver.writes.append((target, (first, last)))

    def _local(self, state: _Rank, instruction: Instruction, times: Times) -> None:
        source, target = instruction.source, instruction.target
        assert source is not None and target is not None
        if instruction.kind is Kind.REDUCE:
            own = state.times(target)
            times = max(times[0], own[0]), max(times[1], own[1])
        elif instruction.kind is Kind.FOLD:
            every = [state.times(Ref(source.buffer, source.chunk + k)) for k in range(source.count)]
            times = max(first for first, _ in every), max(last for _, last in every)
        nbytes, slices = self._slices(target)
        parts = max(1, source.count - 1) if instruction.kind is Kind.FOLD else 1
        seconds = self.costs.reduced_byte * nbytes * parts
        first, last = times[0] + seconds / slices, max(times[0] + seconds, times[1] + seconds / slices)
        state.receiving = max(state.receiving + seconds, last)
        state.writes.append((target, (first, last)))


def whole_blocks(schedule: Schedule) -> int:
    """How many blocks make the whole buffer of the collective, the larger of input and output at the root."""
    spec, size, root = COLLECTIVES[schedule.collective], schedule.size, schedule.root
    return max(spec.input_blocks(size, root, root), spec.output_blocks(size, root, root))


def predict(schedule: Schedule, nbytes: int, costs: LinkCosts, slice_bytes: int) -> float:
    """Seconds that a call takes by these costs, the whole buffer having `nbytes`, until the last rank is done.

    Sums over every message of every rank: exact for the model, and slow for hundreds of ranks.
    """
    return _Walk(schedule, max(nbytes, 1), costs, slice_bytes).run()
