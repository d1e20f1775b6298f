"""Data parallelism and ZeRO: every rank takes its share of the samples, and holds the model whole or in part.

Stage 0 is data parallelism: gradients are all-reduced in buckets. Stages 1, 2 and 3 (Rajbhandari 2020, arXiv 1910.02054)
shard the optimizer's state, the gradients too, and the parameters too; stage 3 is what PyTorch calls FSDP.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.autograd import Array, Operation, Tensor, recompute, unchanged
from parallel.exact import exchange_shapes, sum_over_samples
from parallel.nn import GPT
from parallel.sharding import Sharding, Unit, make_unit
from parallel.units import Pool, convert

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from collectives import Communicator, Work
    from parallel.autograd.tensor import Saved
    from parallel.axis import Axis
    from parallel.nn import Parameter
    from parallel.timeline import Timeline


class MissingGradientError(RuntimeError):
    """A backward gave some parameters no gradient, so that the ranks cannot reduce them together."""


@dataclass(eq=False)
class Chunk:
    """A model, or a stage of one, and its units: those of everything that is in no block, and those of the blocks."""

    model: GPT
    ends: list[Unit]
    blocks: list[Unit]
    pending: deque[Unit] = field(default_factory=deque)
    sample: int | None = None

    @property
    def units(self) -> list[Unit]:
        """In the order of forward."""
        return [*self.ends, *self.blocks]


class DataParallel:
    """Models trained by all ranks of a communicator, each on its share of the samples.

    Gradients are reduced while backward goes on. Arguments: `models`, one, or those stages of a pipeline that this rank has;
    `communicator`, which is split into those of the axes; `sharding`; `seed`, of the first values; `tensor`, the ranks that
    layers are cut among; `timeline`, which is told what happens when. Raises RuntimeError, on every rank, if the ranks'
    models differ.
    """

    def __init__(
        self,
        models: Sequence[GPT],
        communicator: Communicator,
        sharding: Sharding | None = None,
        seed: int = 0,
        tensor: Axis | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self.sharding, self.tensor, self._timeline = sharding or Sharding(), tensor, timeline
        self.rank, self.ranks = communicator.rank, communicator.size
        self.sharding.check(self.ranks)
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.name = name
            _check_models(model, communicator)
            for _, buffer in model.named_buffers():
                communicator.broadcast(buffer)
        group_size = self.ranks // self.sharding.replicas
        self.group = _group(communicator, self.rank // group_size, self.rank % group_size)
        self.gathers, self.reduces = self.group.dup(), self.group.dup()
        self.replicates = _group(communicator, self.rank % group_size, self.rank // group_size)
        self.wait_seconds = 0.0
        self._heap = Pool(lambda elements, dtype: self.group.empty((elements,), dtype))
        self._parts = Pool(lambda elements, dtype: self.group.empty((elements,), dtype))
        self._local = Pool(lambda elements, dtype: np.empty(elements, dtype))
        self.chunks = [self._chunk(model, seed) for model in models]
        self.units = [unit for chunk in self.chunks for unit in chunk.units]
        self._of = {
            slot.parameter: (unit, chunk) for chunk in self.chunks for unit in chunk.units for slot in unit.layout.slots
        }
        self._reducing: deque[tuple[Unit, Work[Any], Array | None, Array | None]] = deque()
        self._replicating: list[tuple[Unit, Work[Any]]] = []
        self._passes = 1
        for parameter in self._of:
            parameter.sink = self
        for chunk in self.chunks:
            self._wrap(chunk)

    def _chunk(self, model: GPT, seed: int) -> Chunk:
        layouts = self.sharding.layouts(model, self.group.size)
        units = [make_unit(layout, self.sharding, self.group, seed, self._local) for layout in layouts]
        blocks = 0 if self.sharding.buckets else len(model.blocks)
        return Chunk(model, units[: len(units) - blocks], units[len(units) - blocks :])

    def _wrap(self, chunk: Chunk) -> None:
        """Have the modules open and close their units, where parameters are not just there."""
        if self.sharding.buckets:
            if self.sharding.recompute:
                for block in chunk.model.blocks.values():
                    block.wrapper = _recompute_block
            return
        around: list[Unit | None] = [None, *chunk.blocks, None]
        chunk.model.wrapper = self._wrapper(chunk.ends, (around[1], around[-2]), recomputes=False)
        for number, block in enumerate(chunk.model.blocks.values()):
            neighbours = around[number + 2], around[number]
            block.wrapper = self._wrapper([chunk.blocks[number]], neighbours, self.sharding.recompute)

    def _wrapper(
        self, units: list[Unit], neighbours: tuple[Unit | None, Unit | None], recomputes: bool
    ) -> Callable[..., Tensor]:
        """Have forward and backward open the units first; `neighbours` are those that each of the two needs next."""

        def run(forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
            self._open(units, neighbours[0])
            result = _recompute_block(forward, *arguments) if recomputes else forward(*arguments)
            if result.requires_gradient:
                result = _boundary(result, before_backward=lambda: self._open(units, neighbours[1]))
            if self.sharding.reshard or not result.requires_gradient:
                self.close(units)
            return result

        return run

    # Parameters

    def _open(self, units: list[Unit], following: Unit | None) -> None:
        """Make the units' parameters ready to compute with, and begin to gather those that are needed next."""
        s = self.sharding
        for unit in units:
            if unit.opened is None and (s.stage == 3 or s.mixed):
                whole = self._gathered(unit)
                if s.mixed:
                    unit.opened = self._local.take(unit.layout.padded, s.compute)
                    convert(whole, unit.opened)
                    if s.stage == 3:
                        self._heap.give(whole)
                else:
                    unit.opened = whole
                for parameter, view in unit.layout.views(unit.opened):
                    parameter.data = view
            elif unit.opened is None:
                self._gathered(unit)
        if s.stage == 3 and following is not None and following.opened is None and following.gathering is None:
            self._gather(following, self._buffer(following))

    def _gather(self, unit: Unit, whole: Array) -> None:
        held = unit.shard.values if unit.shard.copy is None else unit.shard.copy
        work = self._start("all_gather", unit, self.gathers.all_gather(held, whole, async_op=True))
        unit.gathering = work, whole

    def _buffer(self, unit: Unit) -> Array:
        return self._heap.take(unit.layout.padded, self.sharding.storage)

    def _gathered(self, unit: Unit) -> Array:
        """The whole parameters as they are stored, when what is on its way has arrived."""
        if unit.gathering is None:
            if unit.values is not None:
                return unit.values
            self._gather(unit, self._buffer(unit))
        assert unit.gathering is not None
        work, whole = unit.gathering
        unit.gathering = None
        self._wait(work, f"wait for parameters of {unit.layout.name}")
        return whole

    def close(self, units: Sequence[Unit]) -> None:
        """Give up the parameters that were made ready."""
        for unit in units:
            if unit.opened is not None:
                for slot in unit.layout.slots:
                    del slot.parameter.data
                kept = self.sharding.stage == 3 and not self.sharding.mixed
                (self._heap if kept else self._local).give(unit.opened)
                unit.opened = None

    def parameters(self, chunk: Chunk) -> Iterator[tuple[Parameter, Array]]:
        """Yield every parameter of a chunk with its values, gathered where ZeRO shards them; all ranks must go through all.

        Do not keep an array: its memory may serve for something else when the next one is asked for.
        """
        for unit in chunk.units:
            self._open([unit], None)
            for slot in unit.layout.slots:
                yield slot.parameter, slot.parameter.data
            self.close([unit])

    # Gradients

    def begin_step(self, passes: int) -> None:
        """Begin a step in which every chunk goes through so many backward passes."""
        self._passes = passes
        for unit in self.units:
            unit.passes = 0
        if self.sharding.stage < 2:
            for parameter in self._of:
                parameter.gradient = None

    @contextmanager
    def backward(self, chunk: Chunk, sample: int | None, where: str) -> Iterator[None]:
        """Take in the gradients of a backward of a chunk, and begin to reduce them where they are complete.

        `sample`: with exact sums, the number of the one sample that this is, None for none. Raises MissingGradientError, and
        ends the job with its text, if a parameter got no gradient; `where` says where that was.
        """
        chunk.pending, chunk.sample = deque(reversed(chunk.units)), sample
        for unit in chunk.units:
            unit.missing = {slot.parameter for slot in unit.layout.slots}
        yield
        if chunk.pending:
            names = sorted(parameter.name for unit in chunk.units for parameter in unit.missing)
            message = (
                f"backward gave no gradient to {', '.join(names[:5])}{' and others' if len(names) > 5 else ''} on rank "
                f"{self.rank} in {where}: every rank must use every parameter in every micro-batch"
            )
            self.group.abort(message)
            raise MissingGradientError(message)

    def place(self, leaf: Tensor) -> Array:
        """Return where the gradient of a parameter goes (see Sink)."""
        unit, _ = self._of[leaf]  # type: ignore[index]
        s = self.sharding
        if unit.gradient is not None and not s.mixed and not s.exact:
            whole = unit.gradient
        else:
            if unit.buffer is None:
                unit.buffer = self._take_buffer(unit)
            whole = unit.buffer
        slot = next(slot for slot in unit.layout.slots if slot.parameter is leaf)
        return whole[slot.start : slot.stop].reshape(slot.parameter.shape)

    def _take_buffer(self, unit: Unit) -> Array:
        s, size = self.sharding, unit.layout.padded
        while len(self._reducing) > 1:
            self._finish_oldest()
        own = s.mixed or s.exact
        buffer = self._local.take(size, s.compute) if own else self._heap.take(size, s.storage)
        buffer[unit.layout.size :] = 0
        return buffer

    def complete(self, leaf: Tensor) -> None:
        """Begin the reduction of a unit whose last gradient this is, after those of the units before it (see Sink)."""
        unit, chunk = self._of[leaf]  # type: ignore[index]
        unit.missing.discard(leaf)
        # All ranks reduce in the same order, whatever the order in which they are ready.
        while chunk.pending and not chunk.pending[0].missing:
            self._reduce(chunk.pending.popleft(), chunk.sample)

    def _reduce(self, unit: Unit, sample: int | None) -> None:
        s, first, last = self.sharding, unit.passes == 0, unit.passes == self._passes - 1
        unit.passes += 1
        self.close([unit])
        if s.exact:
            assert unit.buffer is not None
            if sample is None:
                self._local.give(unit.buffer)
            else:
                self._sum_copied(unit, unit.buffer)
                unit.tree.add((0, sample), unit.buffer)
        elif s.stage < 2:
            assert unit.gradient is not None
            if unit.buffer is not None:
                if not first:
                    unit.buffer += unit.gradient.astype(s.compute)
                convert(unit.buffer, unit.gradient)
                self._local.give(unit.buffer)
            if last:
                self._sum_copied(unit, unit.gradient)
                self._begin_reduction(unit, unit.gradient, None, None)
        else:
            whole = unit.buffer
            assert whole is not None
            self._sum_copied(unit, whole)
            if s.mixed:
                sent = self._heap.take(unit.layout.padded, s.storage)
                convert(whole, sent)
                self._local.give(whole)
                whole = sent
            out = None if first else self._parts.take(unit.shard.gradient.size, s.storage)
            self._begin_reduction(unit, whole, whole, out)
        if unit.buffer is not None:
            unit.buffer = None
            for slot in unit.layout.slots:
                slot.parameter.gradient = None

    def _sum_copied(self, unit: Unit, gradient: Array) -> None:
        """Add up the gradients of which every tensor-parallel rank has made a part."""
        layout = unit.layout
        if self.tensor is not None and layout.copied < layout.size:
            self.tensor.communicator.all_reduce(gradient[layout.copied : layout.size])

    def _begin_reduction(self, unit: Unit, whole: Array, lent: Array | None, out: Array | None) -> None:
        if self.sharding.stage == 0:
            work = self._start("all_reduce", unit, self.reduces.all_reduce(whole, async_op=True))
        else:
            target = unit.shard.gradient if out is None else out
            work = self._start("reduce_scatter", unit, self.reduces.reduce_scatter(whole, target, async_op=True))
        self._reducing.append((unit, work, lent, out))

    def _finish_oldest(self) -> None:
        unit, work, lent, out = self._reducing.popleft()
        self._wait(work, f"wait for gradients of {unit.layout.name}")
        if lent is not None:
            self._heap.give(lent)
        if out is not None:
            if self.sharding.mixed:
                convert(
                    unit.shard.gradient.astype(self.sharding.compute) + out.astype(self.sharding.compute),
                    unit.shard.gradient,
                )
            else:
                unit.shard.gradient += out
            self._parts.give(out)
        if unit.passes == self._passes and self.sharding.replicas > 1:
            work = self._start("all_reduce", unit, self.replicates.all_reduce(unit.shard.gradient, async_op=True))
            self._replicating.append((unit, work))

    def finish_pass(self) -> None:
        """Wait for what the backward before has begun: its buffers serve for what comes next."""
        while self._reducing:
            self._finish_oldest()

    def finish(self, count: int) -> None:
        """Wait until the gradients of all `count` samples of the global batch are reduced."""
        self.finish_pass()
        if self.sharding.exact:
            shapes = exchange_shapes(
                count, max(unit.layout.padded for unit in self.units), self.group.size, self.sharding.replicas
            )
            space = self._heap.take(sum(map(math.prod, shapes)), self.sharding.compute)
            for unit in self.units:
                self._reduce_by_tree(unit, count, space)
            self._heap.give(space)
        for unit, work in self._replicating:
            self._wait(work, f"wait for gradients of {unit.layout.name}")
        self._replicating.clear()

    def _reduce_by_tree(self, unit: Unit, count: int, space: Array) -> None:
        def wait(what: str, work: Work[Any]) -> Array:
            return self._wait(self._start(what, unit, work), f"wait for gradients of {unit.layout.name}")

        size = unit.layout.padded
        total = sum_over_samples(unit.tree, count, size, self.reduces, self.replicates, space, wait)
        if self.sharding.stage == 0:
            whole = space[:size].reshape(self.group.size, -1)
            total = wait("all_gather", self.gathers.all_gather(total, whole, async_op=True)).reshape(-1)
        convert(total, unit.shard.gradient)

    def add_tied(self, other: Communicator | None) -> None:
        """Add up the gradients of a parameter that two units hold: both here, or one here and one on the `other` rank."""
        tied = [unit.shard.gradient for unit in self.units if unit.layout.tied]
        if len(tied) == 2:
            tied[0] += tied[1]
            tied[1][...] = tied[0]
        elif tied:
            assert other is not None
            other.all_reduce(tied[0])

    # Between the steps

    def counted(self) -> Iterator[Array]:
        """Yield gradients of this rank's shards so that every element of the model is among those of one rank only."""
        if self.rank if self.sharding.stage == 0 else self.replicates.rank:
            return
        first = self.tensor is None or self.tensor.rank == 0
        for unit in self.units:
            if not any(slot.parameter.copy_of for slot in unit.layout.slots):
                shard, shared = unit.shard, unit.layout.shared
                yield shard.gradient if first else shard.gradient[: max(0, shared - shard.part.start)]

    def updated(self) -> None:
        """The shards' values are new: begin to give them to all ranks that compute with them."""
        for unit in self.units:
            if unit.values is not None and self.sharding.stage > 0:
                self._gather(unit, unit.values)

    def restored(self) -> None:
        """The shards' values have been replaced: give them to all arrays that follow them."""
        for unit in self.units:
            if unit.shard.copy is not None:
                convert(unit.shard.values, unit.shard.copy)
        self.updated()
        self.settle()

    def settle(self) -> None:
        """Wait for the gatherings that follow an update."""
        for unit in self.units:
            if unit.values is not None:
                self._gathered(unit)

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the buffers that come and go."""
        return self._heap.bytes + self._parts.bytes + self._local.bytes

    def _start(self, what: str, unit: Unit, work: Work[Any]) -> Work[Any]:
        if self._timeline is not None:
            self._timeline.follow(f"{what} {unit.layout.name}", work)
        return work

    def _wait(self, work: Work[Any], what: str) -> Any:
        began = time.perf_counter()
        result = work.wait()
        ended = time.perf_counter()
        self.wait_seconds += ended - began
        if self._timeline is not None and ended - began > 1e-5:
            self._timeline.add("waiting", what, began, ended)
        return result


def _recompute_block(forward: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    return recompute(lambda y: forward(y, *others), x) if x.requires_gradient else forward(x, *others)


def _boundary_forward(x: Tensor, before_backward: Callable[[], None]) -> tuple[Array, Saved]:
    return x.data, (before_backward,)


def _boundary_product(g: Array, saved: Saved) -> Array:
    saved[0]()
    return g


_boundary = Operation("boundary", _boundary_forward, (_boundary_product,), unchanged)


def _group(communicator: Communicator, color: int, key: int) -> Communicator:
    group = communicator.split(color, key)
    assert group is not None
    return group


def _check_models(model: GPT, communicator: Communicator) -> None:
    description = repr([(name, p.shape, p.decay) for name, p in model.named_parameters()])
    mine = np.frombuffer(hashlib.sha256(description.encode()).digest(), np.uint8)
    everyone = communicator.all_gather(mine)
    differing = [rank for rank in range(communicator.size) if (everyone[rank] != everyone[0]).any()]
    if differing:
        raise RuntimeError(
            f"ranks {', '.join(map(str, differing))} have a model with other parameters (names, shapes or order) than "
            "rank 0; build the same on all ranks"
        )


def sum_numbers(communicator: Communicator, *values: float) -> list[float]:
    """Return the sums of some numbers of every rank, in float64 and with the same bits on all of them."""
    return [float(value) for value in communicator.all_reduce(np.array(values, np.float64))]
