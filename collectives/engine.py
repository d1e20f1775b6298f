"""The reference engine: runs any plan on any message transport.

A dispatch table over the kinds of instruction, with no branch for any algorithm. Several executions may be in flight; all
of them advance whenever this process waits for any. Receives that reduce go through staging slices, posted ahead so that
the next slice arrives while this one is reduced.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

import kernels
from collectives.calls import Call, describe, difference
from collectives.errors import CollectiveMismatch, CollectiveTimeout, exception_of
from collectives.plan import Plan, Span, Task
from collectives.schedule import Kind
from kernels import ReduceOp
from transports.base import Ledger, Request, Transport
from transports.errors import CommunicationError, Failure, JobFailed, LabelMismatch

Array = np.ndarray[Any, np.dtype[Any]]

STAGED_SLICES: Final = 4
"""Slices per peer received ahead of their reduction: one being reduced, the others on the wire."""


@dataclass(slots=True, eq=False)
class Execution:
    """One call in flight on one rank."""

    call: Call
    sequence: int
    plan: Plan
    arrays: dict[str, Array]
    """Flat arrays of one dtype: `in` and `out`; `tmp` is added here."""
    peers: Sequence[int]
    """The transport's rank of each rank of the communicator."""
    channel: int
    ledger: Ledger
    op: ReduceOp | None = None
    """What reductions compute; the call may name another (AVG is SUM, then `finish` divides)."""
    finish: Callable[[], None] | None = None
    """Called once when the last task is done."""
    done: bool = False
    began: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    """Seconds of `time.perf_counter`."""
    error: CommunicationError | None = None

    label: bytes = field(init=False)
    waits: list[int] = field(init=False)
    remaining: int = field(init=False)
    sends: dict[int, deque[int]] = field(init=False)
    receives: dict[int, deque[int]] = field(init=False)
    staged: dict[int, int] = field(init=False)
    flying: list[tuple[Request, int, Array | None]] = field(init=False)
    arrived: dict[int, Array] = field(init=False)

    def __post_init__(self) -> None:
        self.label = self.call.label()
        self.waits = [task.waits for task in self.plan.tasks]
        self.remaining = len(self.plan.tasks)
        self.sends = {peer: deque(queue) for peer, queue in self.plan.sends.items()}
        self.receives = {peer: deque(queue) for peer, queue in self.plan.receives.items()}
        self.staged = defaultdict(int)
        self.flying = []
        self.arrived = {}
        if self.plan.scratch_elements:
            self.arrays["tmp"] = np.empty(self.plan.scratch_elements, self.call.dtype)

    def view(self, span: Span | None) -> Array:
        """The elements of a span."""
        assert span is not None
        return self.arrays[span.buffer][span.start : span.stop]

    def awaited(self) -> dict[int, Task]:
        """Rank of the communicator -> the first task still waiting for it."""
        flying = {index for _, index, _ in self.flying}
        tasks: dict[int, Task] = {}
        for queues in (self.plan.receives, self.plan.sends):
            for peer, queue in queues.items():
                waiting = self.receives if queues is self.plan.receives else self.sends
                pending = [index for index in queue if index in flying or index in waiting[peer]]
                if pending and peer not in tasks:
                    tasks[peer] = self.plan.tasks[pending[0]]
        return tasks


def bytes_of(array: Array) -> memoryview:
    """The memory of a contiguous array, as bytes."""
    flat: Any = array.view(np.uint8)
    return memoryview(flat).cast("B") if array.size else memoryview(b"")


class Engine:
    """Runs executions on one transport, for all communicators that share it."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.active: list[Execution] = []
        self._staging: dict[tuple[np.dtype[Any], int], list[Array]] = defaultdict(list)

    def start(self, execution: Execution) -> None:
        """Begin: post what can be posted. Raises as `wait` does."""
        with _Translate(self, execution):
            if execution.call.collective != "send/recv":
                self.transport.expect(execution.channel, execution.label)
            self.active.append(execution)
            # Chosen before any has run: those that become ready meanwhile are run by `_complete`.
            for index in [index for index in execution.plan.local if execution.waits[index] == 0]:
                self._run_local(execution, index)
            self._advance(execution)

    def poll(self, execution: Execution) -> bool:
        """Advance everything without waiting; returns whether this execution is done."""
        with _Translate(self, execution):
            if not execution.done:
                self.transport.progress(0.0)
                self._advance_all()
        return execution.done

    def wait(self, execution: Execution, timeout: float) -> None:
        """Advance everything until this execution is done.

        Raises CollectiveTimeout, naming the ranks awaited, after `timeout` seconds; CollectiveMismatch or PeerLost, or
        whatever the failing rank met, when the job has failed.
        """
        deadline = time.monotonic() + timeout
        with _Translate(self, execution):
            self._advance_all()
            while not execution.done:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise CollectiveTimeout(_timeout_message(execution, timeout))
                self.transport.progress(remaining)
                self._advance_all()

    def _advance_all(self) -> None:
        for execution in tuple(self.active):
            with _Translate(self, execution):
                self._advance(execution)

    def _advance(self, execution: Execution) -> None:
        moved = True
        while moved and not execution.done:
            self._post(execution)
            moved = self._reap(execution)
            if execution.remaining == 0:
                execution.done, execution.ended = True, time.perf_counter()
                self._retire(execution)
                if execution.finish is not None:
                    execution.finish()

    def _retire(self, execution: Execution) -> None:
        if execution in self.active:
            self.active.remove(execution)
        self.transport.forget(execution.channel)

    def _post(self, execution: Execution) -> None:
        """Post every message whose turn has come: in the order of the wire, and not before its data is ready."""
        tasks = execution.plan.tasks
        for queues in (execution.receives, execution.sends):
            for peer, queue in queues.items():
                while queue and _POST[tasks[queue[0]].kind](self, execution, peer, queue[0]):
                    queue.popleft()

    def _reap(self, execution: Execution) -> bool:
        """Take note of finished messages; returns whether there were any."""
        landed: list[tuple[Request, int, Array | None]] = []
        flying: list[tuple[Request, int, Array | None]] = []
        for entry in execution.flying:  # asked once each: another thread may complete a request meanwhile
            (landed if entry[0].done else flying).append(entry)
        if not landed:
            return False
        execution.flying = flying
        for _, index, staging in landed:
            if staging is None:
                self._complete(execution, index)
            else:
                execution.arrived[index] = staging
                if execution.waits[index] == 0:
                    self._reduce_arrived(execution, index)
        return True

    def _complete(self, execution: Execution, index: int) -> None:
        execution.remaining -= 1
        for dependent in execution.plan.tasks[index].dependents:
            execution.waits[dependent] -= 1
            if execution.waits[dependent] == 0:
                if execution.plan.tasks[dependent].peer is None:
                    self._run_local(execution, dependent)
                elif dependent in execution.arrived:
                    self._reduce_arrived(execution, dependent)

    def _post_send(self, execution: Execution, peer: int, index: int) -> bool:
        if execution.waits[index]:
            return False
        data = bytes_of(execution.view(execution.plan.tasks[index].source))
        request = self.transport.send(execution.peers[peer], execution.channel, execution.label, data, execution.ledger)
        execution.flying.append((request, index, None))
        return True

    def _post_recv(self, execution: Execution, peer: int, index: int) -> bool:
        if execution.waits[index]:
            return False
        data = bytes_of(execution.view(execution.plan.tasks[index].target))
        request = self.transport.recv(execution.peers[peer], execution.channel, execution.label, data, execution.ledger)
        execution.flying.append((request, index, None))
        return True

    def _post_recv_reduce(self, execution: Execution, peer: int, index: int) -> bool:
        if execution.staged[peer] >= STAGED_SLICES:
            return False
        execution.staged[peer] += 1
        span = execution.plan.tasks[index].target
        assert span is not None
        pool = self._staging[execution.call.dtype, span.stop - span.start]
        staging = pool.pop() if pool else np.empty(span.stop - span.start, execution.call.dtype)
        data = bytes_of(staging)
        request = self.transport.recv(execution.peers[peer], execution.channel, execution.label, data, execution.ledger)
        execution.flying.append((request, index, staging))
        return True

    def _reduce_arrived(self, execution: Execution, index: int) -> None:
        task = execution.plan.tasks[index]
        staging = execution.arrived.pop(index)
        assert execution.op is not None and task.peer is not None
        kernels.reduce(execution.op, staging, execution.view(task.source), execution.view(task.target))
        pool = self._staging[execution.call.dtype, staging.size]
        if len(pool) < STAGED_SLICES:
            pool.append(staging)
        execution.staged[task.peer] -= 1
        self._complete(execution, index)

    def _run_local(self, execution: Execution, index: int) -> None:
        task = execution.plan.tasks[index]
        _LOCAL[task.kind](execution, task)
        self._complete(execution, index)


def _copy(execution: Execution, task: Task) -> None:
    execution.view(task.target)[:] = execution.view(task.source)


def _reduce(execution: Execution, task: Task) -> None:
    target = execution.view(task.target)
    assert execution.op is not None
    kernels.reduce(execution.op, target, execution.view(task.source), target)


def _fold(execution: Execution, task: Task) -> None:
    assert execution.op is not None and task.source is not None
    memory, first = execution.arrays[task.source.buffer], task.source
    starts = range(first.start, first.start + task.contributions * task.stride, task.stride)
    length = first.stop - first.start
    inputs = [memory[start : start + length] for start in starts]
    kernels.reduce_many(execution.op, inputs, execution.view(task.target))


_POST: Final[dict[Kind, Callable[[Engine, Execution, int, int], bool]]] = {
    Kind.SEND: Engine._post_send,
    Kind.RECV: Engine._post_recv,
    Kind.RECV_REDUCE: Engine._post_recv_reduce,
}

_LOCAL: Final[dict[Kind, Callable[[Execution, Task], None]]] = {
    Kind.COPY: _copy,
    Kind.REDUCE: _reduce,
    Kind.FOLD: _fold,
}


class _Translate:
    """Turns what a transport raises into the errors of collectives, and makes every other rank learn of it."""

    def __init__(self, engine: Engine, execution: Execution) -> None:
        self.engine, self.execution = engine, execution

    def __enter__(self) -> None:
        if self.execution.error is not None:
            raise self.execution.error

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        transport, execution = self.engine.transport, self.execution
        if isinstance(error, JobFailed):
            translated = exception_of(error.failure, transport.rank)
        elif isinstance(error, LabelMismatch):
            execution = next((other for other in self.engine.active if other.channel == error.channel), execution)
            translated = CollectiveMismatch(_mismatch_message(execution, error, transport.rank))
        elif isinstance(error, CollectiveTimeout):
            translated = error
        else:
            if not isinstance(error, CommunicationError):
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                transport.abort(
                    Failure("Aborted", transport.rank, f"rank {transport.rank} stopped in {execution.call}: {reason}")
                )
            return
        translated.add_note(
            f"in call {execution.sequence} of this communicator on rank {transport.rank}: {execution.call}"
        )
        transport.abort(Failure(type(translated).__name__, transport.rank, str(translated)))
        execution.error = translated
        if translated is error:
            return
        raise translated from None


def _mismatch_message(execution: Execution, error: LabelMismatch, rank: int) -> str:
    if error.sizes is not None:
        detail = (
            f"the message has {error.sizes[1]} bytes where {error.sizes[0]} were expected: the element counts differ"
        )
    else:
        detail = "make the same calls in the same order, with the same dtype, operation, count and root, on all ranks"
        detail += difference(error.ours, error.theirs)
    return (
        f"call {execution.sequence} differs between ranks: rank {rank} called {describe(error.ours)}, "
        f"rank {error.peer} called {describe(error.theirs)}; {detail}"
    )


def _timeout_message(execution: Execution, timeout: float) -> str:
    awaited = "; ".join(
        f"rank {peer} (step {task.step}: {task.kind.value} of {(task.source or task.target or Span('out', 0, 0))})"
        for peer, task in sorted(execution.awaited().items())
    )
    return (
        f"call {execution.sequence}, {execution.call}, was not finished after {timeout:g} s; still waiting for {awaited}. "
        "Those ranks have not called it, or are slower than the timeout: see COLLECTIVES_TIMEOUT and init(timeout=…)"
    )
