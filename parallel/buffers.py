"""How many bytes the buffers that come and go take: they lie in pools, which never have more of them than were lent at once.

What is lent when follows from the schedule and from the order of the units, never from timing. So a step is gone through here
with sizes in place of arrays, and the most that was lent of each size is what the pools have.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parallel.exact import complete_nodes
from parallel.schedules import Action, Kind

if TYPE_CHECKING:
    from parallel.sharding import Sharding


class Lent:
    """The buffers of a pool, by the bytes of each."""

    def __init__(self) -> None:
        self._now: Counter[int] = Counter()
        self._most: Counter[int] = Counter()

    def take(self, nbytes: int) -> None:
        """One more."""
        self._now[nbytes] += 1
        self._most[nbytes] = max(self._most[nbytes], self._now[nbytes])

    def give(self, nbytes: int) -> None:
        """One is back."""
        self._now[nbytes] -= 1

    @property
    def bytes(self) -> int:
        """Of all that there ever were: a buffer serves again for its size alone."""
        return sum(nbytes * count for nbytes, count in self._most.items())


@dataclass(eq=False)
class UnitSize:
    """A unit of `elements`.

    `early`: backward makes a gradient of it before it comes to the blocks; `tail`: all of them.
    """

    elements: int
    early: bool = False
    tail: bool = False
    opened: bool = False
    gathering: bool = False
    buffer: bool = False
    passes: int = 0
    summed: range = field(default_factory=lambda: range(0))


@dataclass(frozen=True)
class ChunkSizes:
    """The units of a chunk, as `data_parallel.Chunk` has them."""

    ends: Sequence[UnitSize]
    blocks: Sequence[UnitSize]


class Step:
    """One step of a rank: `parts`, in which each unit is held; `samples`, the number of each micro-batch's with exact sums."""

    def __init__(
        self, sharding: Sharding, chunks: Sequence[ChunkSizes], parts: int, samples: Sequence[int | None]
    ) -> None:
        self.sharding, self.chunks, self.parts, self.samples = sharding, chunks, parts, samples
        self.heap, self.summed, self.local = Lent(), Lent(), Lent()
        self._storage, self._compute = sharding.storage.itemsize, sharding.compute.itemsize
        self._reducing: deque[tuple[int, int]] = deque()

    def run(self, row: Sequence[Action], exchanged: int) -> int:
        """Return the bytes of all pools after the actions of `row`, and an exchange of so many elements of trees' nodes."""
        if self.sharding.buckets:
            return 0
        for action in row:
            chunk = self.chunks[action.chunk]
            if action.kind is not Kind.INPUT_GRADIENT:
                self._finish(0)
            if action.kind is Kind.FORWARD:
                self._forward(chunk)
            if action.kind in (Kind.BACKWARD, Kind.INPUT_GRADIENT):
                self._open(chunk.ends, chunk.blocks[-1])
            if action.kind is not Kind.FORWARD:
                self._backward(chunk, action)
        self._finish(0)
        if exchanged:
            self.heap.take(exchanged * self._compute)
        return self.heap.bytes + self.summed.bytes + self.local.bytes

    def _forward(self, chunk: ChunkSizes) -> None:
        self._open(chunk.ends, chunk.blocks[0])
        for block, following in zip(chunk.blocks, [*chunk.blocks[1:], None], strict=True):
            self._open([block], following)
            if self.sharding.reshard:
                self._close(block)
        if self.sharding.reshard:
            for unit in chunk.ends:
                self._close(unit)

    def _backward(self, chunk: ChunkSizes, action: Action) -> None:
        opens, places = action.kind is not Kind.WEIGHT_GRADIENT, action.kind is not Kind.INPUT_GRADIENT
        sample = self.samples[action.micro_batch]
        if places:
            self._place([unit for unit in chunk.ends if unit.early])
        for block, following in zip(chunk.blocks[::-1], [*chunk.blocks[-2::-1], None], strict=True):
            if opens:
                self._open([block], following)
            if places:
                self._place([block])
                self._reduce(block, sample)
        if places:
            waiting = list(chunk.ends)
            while waiting and waiting[-1].tail:  # units are reduced in one order, each when it is complete
                self._reduce(waiting.pop(), sample)
            self._place(waiting)
            for unit in waiting[::-1]:
                self._reduce(unit, sample)
        else:
            for unit in [*chunk.ends, *chunk.blocks]:
                self._close(unit)

    def _open(self, units: Sequence[UnitSize], following: UnitSize | None) -> None:
        s = self.sharding
        for unit in units:
            if unit.opened or not (s.stage == 3 or s.mixed):
                continue
            if s.stage == 3 and not unit.gathering:
                self.heap.take(unit.elements * self._storage)
            unit.gathering, unit.opened = False, True
            if s.mixed:
                self.local.take(unit.elements * self._compute)
                if s.stage == 3:
                    self.heap.give(unit.elements * self._storage)
        if s.stage == 3 and following is not None and not following.opened and not following.gathering:
            self.heap.take(following.elements * self._storage)
            following.gathering = True

    def _close(self, unit: UnitSize) -> None:
        if unit.opened:
            unit.opened = False
            if self.sharding.mixed:
                self.local.give(unit.elements * self._compute)
            else:
                self.heap.give(unit.elements * self._storage)

    def _place(self, units: Sequence[UnitSize]) -> None:
        """Take the buffers of the units' gradients."""
        s = self.sharding
        for unit in units:
            if unit.buffer or (s.stage < 2 and not s.mixed and not s.exact):
                continue
            self._finish(1)
            unit.buffer = True
            if s.mixed or s.exact:
                self.local.take(unit.elements * self._compute)
            else:
                self.heap.take(unit.elements * self._storage)

    def _reduce(self, unit: UnitSize, sample: int | None) -> None:
        s, whole = self.sharding, unit.elements * self._storage
        first = unit.passes == 0
        unit.passes += 1
        self._close(unit)
        if not unit.buffer:
            return
        unit.buffer = False
        if s.exact:
            before = len(complete_nodes(unit.summed))
            if sample is not None:
                unit.summed = range(unit.summed.start if unit.summed else sample, sample + 1)
            for _ in range(before + 1 - len(complete_nodes(unit.summed))):
                self.local.give(unit.elements * self._compute)
            return
        if s.mixed:
            if s.stage > 1:
                self.heap.take(whole)
            self.local.give(unit.elements * self._compute)
        if s.stage > 1:
            part = 0 if first else whole // self.parts
            if part:
                self.summed.take(part)
            self._reducing.append((whole, part))

    def _finish(self, left: int) -> None:
        while len(self._reducing) > left:
            whole, part = self._reducing.popleft()
            self.heap.give(whole)
            if part:
                self.summed.give(part)
