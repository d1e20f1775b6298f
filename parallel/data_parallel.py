"""Data parallelism and ZeRO: every rank takes its share of the samples, and holds the model whole or in part.

Stage 0 is data parallelism: gradients are all-reduced in buckets. Stages 1, 2 and 3 (Rajbhandari 2020, arXiv 1910.02054)
shard the optimizer's state, the gradients too, and the parameters too; stage 3 is what PyTorch calls FSDP.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.autograd import Array, Operation, Tensor, no_gradient, recompute
from parallel.exact import exact_sum, grain_sums, sum_over_samples
from parallel.formulas import share
from parallel.nn import GPT, Draws
from parallel.sharding import Sharding, Unit, make_unit
from parallel.units import Pool, convert

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from collectives import Communicator, Work
    from parallel.autograd.tensor import Saved
    from parallel.timeline import Timeline


class MissingGradientError(RuntimeError):
    """A backward gave some parameters no gradient, so that the ranks cannot reduce them together."""


class DataParallel:
    """A model trained by all ranks of a communicator, each on its share of the samples.

    Gradients are those of the mean loss over all tokens of the global batch: every rank weights its tokens by 1 / (tokens of
    the global batch), so that the sum over ranks is the mean exactly, with uneven shares as well. They are reduced while
    backward goes on. Arguments: `model`; `communicator`, which is split into those of the axes; `sharding`; `seed`, of the
    first values; `timeline`, which is told what happens when. Raises RuntimeError, on every rank, if the ranks' models
    differ.
    """

    def __init__(
        self,
        model: GPT,
        communicator: Communicator,
        sharding: Sharding | None = None,
        seed: int = 0,
        timeline: Timeline | None = None,
    ) -> None:
        sharding = sharding or Sharding()
        self.model, self.sharding, self._timeline = model, sharding, timeline
        self.rank, self.ranks = communicator.rank, communicator.size
        sharding.check(self.ranks)
        for name, parameter in model.named_parameters():
            parameter.name = name
        _check_models(model, communicator)
        for _, buffer in model.named_buffers():
            communicator.broadcast(buffer)
        group_size = self.ranks // sharding.replicas
        self.group = _group(communicator, self.rank // group_size, self.rank % group_size)
        self.gathers, self.reduces = self.group.dup(), self.group.dup()
        self.replicates = _group(communicator, self.rank % group_size, self.rank // group_size)
        self.wait_seconds = 0.0
        self._heap = Pool(lambda elements, dtype: self.group.empty((elements,), dtype))
        self._parts = Pool(lambda elements, dtype: self.group.empty((elements,), dtype))
        self._local = Pool(lambda elements, dtype: np.empty(elements, dtype))
        layouts = sharding.layouts(model, self.group.size)
        self.units = [make_unit(layout, sharding, self.group, seed, self._local) for layout in layouts]
        self._of = {slot.parameter: unit for unit in self.units for slot in unit.layout.slots}
        self._pending: deque[Unit] = deque()
        self._reducing: deque[tuple[Unit, Work[Any], Array | None, Array | None]] = deque()
        self._replicating: list[tuple[Unit, Work[Any]]] = []
        self._micro_batch, self._last, self._samples = 0, True, range(0)
        self._wrap()

    def _wrap(self) -> None:
        """Have the modules open and close their units, where parameters are not just there."""
        for parameter in self._of:
            parameter.sink = self
        if self.sharding.buckets:
            if self.sharding.recompute:
                for block in self.model.blocks:
                    block.wrapper = _recompute_block
            return
        self.model.wrapper = self._wrapper(self.units[0], recomputes=False)
        for block, unit in zip(self.model.blocks, self.units[1:], strict=True):
            block.wrapper = self._wrapper(unit, recomputes=self.sharding.recompute)

    def _wrapper(self, unit: Unit, recomputes: bool) -> Callable[..., Tensor]:
        def run(forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
            self._open(unit, 1)
            result = _recompute_block(forward, *arguments) if recomputes else forward(*arguments)
            if result.requires_gradient:
                result = _boundary(result, before_backward=lambda: self._open(unit, -1))
            if self.sharding.reshard or not result.requires_gradient:
                self._close(unit)
            return result

        return run

    # Parameters

    def _open(self, unit: Unit, direction: int) -> None:
        """Make the unit's parameters ready to compute with, and begin to gather those that are needed next."""
        s = self.sharding
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
        if s.stage == 3:
            index = self.units.index(unit) + direction
            following = self.units[index % len(self.units)]
            if index != 0 and index != len(self.units) and following.opened is None and following.gathering is None:
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

    def _close(self, unit: Unit) -> None:
        """Give up the parameters that were made ready."""
        if unit.opened is None:
            return
        for slot in unit.layout.slots:
            del slot.parameter.data
        (self._heap if self.sharding.stage == 3 and not self.sharding.mixed else self._local).give(unit.opened)
        unit.opened = None

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield name and values of every parameter, whole, on every rank; all ranks must go through all of it.

        Do not keep an array: its memory may serve for something else when the next one is asked for.
        """
        for unit in self.units:
            self._open(unit, 1)
            for slot in unit.layout.slots:
                yield slot.parameter.name, slot.parameter.data
            self._close(unit)

    # Gradients

    def samples(self, count: int) -> range:
        """Return which of `count` samples are this rank's: a run of ⌈count/ranks⌉ or ⌊count/ranks⌋."""
        return share(count, self.ranks, self.rank)

    def accumulate(
        self,
        windows: Array,
        first: int,
        count: int,
        micro_batches: int,
        seed: int,
        step: int,
        scale: float = 1.0,
    ) -> list[float]:
        """Compute the gradients of windows (samples, sequence + 1), and begin to reduce them; `finish` ends it.

        `first`: the global number of the first sample, of `count` in the global batch; `seed` and `step` are those of the
        dropout; `scale` multiplies the loss, for the sake of 16-bit gradients. Returns this rank's parts of the mean loss, unscaled: one for each
        micro-batch, or, with `exact`, for each sample. Raises MissingGradientError, and ends the job with its text, if a
        parameter got no gradient.
        """
        exact, global_tokens = self.sharding.exact, count * (windows.shape[1] - 1)
        parts = len(windows) if exact else micro_batches
        self._samples = range(first, first + len(windows))
        if self.sharding.stage < 2:
            for parameter in self._of:
                parameter.gradient = None
        losses = []
        for number in range(parts):
            part = share(len(windows), parts, number)
            while self._reducing:  # what the micro-batch before has begun
                self._finish_oldest()
            self._micro_batch, self._last = number, number == parts - 1
            losses.append(
                self._forward_backward(
                    windows[part.start : part.stop], first + part.start, step, seed, global_tokens, scale
                )
            )
        if exact:
            for _ in range(len(share(count, self.ranks, 0)) - parts):
                self._idle_pass()
        return losses

    def _idle_pass(self) -> None:
        """Gather as a forward and backward do: other ranks have one sample more."""
        if self.sharding.stage < 3:
            return
        rest, *blocks = self.units
        for direction, order in ((1, blocks), (-1, blocks[::-1])):
            self._open(rest, direction)
            for unit in order:
                self._open(unit, direction)
                if self.sharding.reshard or direction < 0:
                    self._close(unit)
            if self.sharding.reshard or direction < 0:
                self._close(rest)

    def _forward_backward(
        self, windows: Array, first: int, step: int, seed: int, global_tokens: int, scale: float
    ) -> float:
        self._pending = deque(reversed(self.units))
        for unit in self.units:
            unit.missing = {slot.parameter for slot in unit.layout.slots}
        draws = Draws(seed, step, first) if self.model.configuration.dropout else None
        began = time.perf_counter()
        loss = self.model.loss(windows, scale / global_tokens, draws)
        middle = time.perf_counter()
        loss.backward()
        if self._timeline is not None:
            self._timeline.add("compute", "forward", began, middle)
            self._timeline.add("compute", "backward", middle, time.perf_counter())
        if self._pending:
            names = sorted(parameter.name for unit in self.units for parameter in unit.missing)
            message = (
                f"backward gave no gradient to {', '.join(names[:5])}{' and others' if len(names) > 5 else ''} on rank "
                f"{self.rank} in step {step + 1}: every rank must use every parameter in every micro-batch"
            )
            self.group.abort(message)
            raise MissingGradientError(message)
        return float(loss.data) / scale

    def place(self, leaf: Tensor) -> Array:
        """Return where the gradient of a parameter goes (see Sink)."""
        unit = self._of[leaf]  # type: ignore[index]
        s = self.sharding
        if unit.gradient is not None and not s.mixed and not s.exact:
            whole = unit.gradient
        else:
            if unit.buffer is None:
                unit.buffer = self._take_buffer(unit)
            whole = unit.buffer
        slot = next(slot for slot in unit.layout.slots if slot.parameter is leaf)
        return whole[slot.start : slot.stop].reshape(slot.parameter.full_shape)

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
        self._of[leaf].missing.discard(leaf)  # type: ignore[index]
        # All ranks reduce in the same order, whatever the order in which they are ready.
        while self._pending and not self._pending[0].missing:
            self._reduce(self._pending.popleft())

    def _reduce(self, unit: Unit) -> None:
        s, first = self.sharding, self._micro_batch == 0
        self._close(unit)
        if s.exact:
            assert unit.buffer is not None
            unit.tree.add((0, self._samples.start + self._micro_batch), unit.buffer)
        elif s.stage < 2:
            assert unit.gradient is not None
            if unit.buffer is not None:
                if not first:
                    unit.buffer += unit.gradient.astype(s.compute)
                convert(unit.buffer, unit.gradient)
                self._local.give(unit.buffer)
            if self._last:
                self._begin_reduction(unit, unit.gradient, None, None)
        else:
            whole = unit.buffer
            assert whole is not None
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
        if self._last and self.sharding.replicas > 1:
            work = self._start("all_reduce", unit, self.replicates.all_reduce(unit.shard.gradient, async_op=True))
            self._replicating.append((unit, work))

    def finish(self, count: int) -> None:
        """Wait until the gradients of all `count` samples of the global batch are reduced."""
        while self._reducing:
            self._finish_oldest()
        if self.sharding.exact:
            for unit in self.units:
                self._reduce_by_tree(unit, count)
        for unit, work in self._replicating:
            self._wait(work, f"wait for gradients of {unit.layout.name}")
        self._replicating.clear()

    def _reduce_by_tree(self, unit: Unit, count: int) -> None:
        def wait(what: str, work: Work[Any]) -> Array:
            return self._wait(self._start(what, unit, work), f"wait for gradients of {unit.layout.name}")

        total = sum_over_samples(
            unit.tree, count, unit.layout.padded, self.reduces, self.replicates, self.sharding.compute, wait
        )
        if self.sharding.stage == 0:
            total = wait("all_gather", self.gathers.all_gather(total, async_op=True)).reshape(-1)
        convert(total, unit.shard.gradient)

    # Between the steps

    def squares(self) -> float:
        """This rank's part of the squared norm of the gradients: the sum over all ranks is the whole."""
        counts = self.rank == 0 if self.sharding.stage == 0 else self.replicates.rank == 0  # each element once
        return sum(unit.shard.sum_of_squares() for unit in self.units) if counts else 0.0

    def exact_squares(self) -> float:
        """The squared norm of the gradients, with bits that do not depend on the layout."""
        sums = grain_sums(unit.shard.gradient.astype(self.sharding.compute) for unit in self.units)
        everyone = sums if self.sharding.stage == 0 else self.group.all_gather(sums)
        return exact_sum(everyone.ravel().tolist())

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

    def evaluate(self, windows: Array, at_once: int, passes: int) -> list[float]:
        """Return the summed losses of these windows, `at_once` at a time, without any gradients.

        In `passes` passes, the same number on all ranks: those that have run out of windows repeat one, and drop its loss.
        """
        parts = [windows[start : start + at_once] for start in range(0, len(windows), at_once)]
        with no_gradient():
            losses = [float(self.model.loss(part, 1.0).data) for part in parts]
            for _ in range(passes - len(parts)):
                self.model.loss(windows[:1], 1.0)
        return losses

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


_boundary = Operation("boundary", _boundary_forward, (_boundary_product,))


def _group(communicator: Communicator, color: int, key: int) -> Communicator:
    group = communicator.split(color, key)
    assert group is not None
    return group


def _check_models(model: GPT, communicator: Communicator) -> None:
    description = repr([(name, p.full_shape, p.decay) for name, p in model.named_parameters()])
    mine = np.frombuffer(hashlib.sha256(description.encode()).digest(), np.uint8)
    everyone = communicator.all_gather(mine)
    differing = [rank for rank in range(communicator.size) if (everyone[rank] != everyone[0]).any()]
    if differing:
        raise RuntimeError(
            f"ranks {', '.join(map(str, differing))} have a model with other parameters (names, shapes or order) than "
            "rank 0; build the same on all ranks"
        )


def sum_over_ranks(communicator: Communicator, *values: float) -> list[float]:
    """Return the sums of some numbers of every rank, in float64 and with the same bits on all of them."""
    return [float(value) for value in communicator.all_reduce(np.array(values, np.float64))]
