"""Collectives over shared memory: the native engine of one communicator, and what it asks of Python while it waits.

The native engine runs the schedule `direct` over the boards of `transports/native/board.hpp`, and any other schedule over byte
channels, from the same plans as the reference engine: each is made once, here, and kept there. It serves every operation and
dtype that its kernels know; `Mapped.serves` says which, alike on all ranks, and the reference engine runs the rest.
"""

from __future__ import annotations

import atexit
import importlib
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import numpy as np

import kernels
from collectives.calls import Call, checksum, describe, difference
from collectives.errors import CollectiveMismatch, CollectiveTimeout, exception_of
from collectives.plan import Plan
from collectives.schedule import Kind, Schedule
from collectives.spec import COLLECTIVES
from kernels import ReduceOp, dtypes
from kernels.ops import TABLE
from transports.base import Transport
from transports.errors import Aborted, CommunicationError, Failure, JobFailed
from transports.heap import PAGE
from transports.shm import DOORBELL_BYTES, ShmTransport

if TYPE_CHECKING:
    from collectives.arrays import Array


def _load() -> Any:
    try:
        return importlib.import_module("collectives._native")
    except ImportError:  # a pure Python installation
        return None


_native: Final = _load()
if _native is not None:
    atexit.register(_native.stop_background)

FIRST_BOARD: Final = DOORBELL_BYTES
"""Where the board of the first communicator lies in every heap: right behind the doorbell."""
_INDEX: Final = {name: index for index, name in enumerate((*COLLECTIVES, "send/recv"))}
_OPERATIONS: Final = tuple(ReduceOp)
_KINDS: Final = tuple(Kind)
_BUFFERS: Final = ("in", "out", "tmp")
_SPINS: Final = 3000
_SPINS_OVERSUBSCRIBED: Final = 1


class NoFastPath:
    """What stands in for the native engine's fast path where there is none: every call declines, having done nothing.

    The native one takes numpy arrays as they are, contiguous and writable, and declines everything else.
    """

    def _decline(self, *_: object) -> bool:
        return False

    all_reduce = all_gather = reduce_scatter = broadcast = reduce = gather = scatter = all_to_all = scan = barrier = (
        _decline
    )
    send = recv = sendrecv = _decline


def new_board(transport: Transport, ranks: int) -> int | None:
    """Room for this rank's board of a new communicator of at most `ranks` ranks, as an offset in its heap; None without shared memory.

    Raises MemoryError.
    """
    if _native is None or not isinstance(transport, ShmTransport):
        return None
    size = -(-_native.board_bytes(ranks) // PAGE) * PAGE
    offset = transport.heap.allocate(size)
    transport.heap.mapping.view(offset, size)[:] = bytes(size)
    return offset


class Mapped:
    """The native engine of one communicator; `forced`: collective -> how (see `Call`) it runs, where not as `direct`."""

    def __init__(
        self,
        transport: ShmTransport,
        members: Sequence[int],
        boards: Sequence[int],
        timeout: float,
        forced: Mapping[str, str],
    ) -> None:
        heaps = [transport.heaps[member] for member in members]
        backend, me = kernels.backend(), weakref.ref(self)
        # First of all attributes, so that it goes first too: no thread steps it when the arrays and heaps below go.
        self.native: Any = _native.Group(
            rank=members.index(transport.rank),
            members=[
                (heap.address, heap.address + board, transport.processes[member])
                for heap, board, member in zip(heaps, boards, members, strict=True)
            ],
            heap_bytes=transport.heap.mapping.size,
            ndarray=np.ndarray,
            type_numbers=[(dtype.num, dtypes.code(dtype)) for dtype in dtypes.DTYPES],
            operations=list(_OPERATIONS),
            operation_codes=[TABLE[op].code for op in _OPERATIONS],
            look=lambda *position: cast(Mapped, me())._look(*position),
            mismatch=lambda *calls: cast(Mapped, me())._mismatch(*calls),
            instruction_set=backend.rpartition(" ")[2],
            spins=_SPINS if transport.size <= transport.cores else _SPINS_OVERSUBSCRIBED,
        )
        for collective, how in forced.items():
            self.native.force(_INDEX[collective], checksum(how))
        self._heaps = heaps
        self._in_flight: dict[Any, object] = {}
        self._left: tuple[int, set[int]] = (0, set())
        self.transport, self.members, self.timeout = transport, tuple(members), timeout
        self.rank: Final = self.members.index(transport.rank)
        _alive.add(self)

    def serves(self, dtype: np.dtype[Any], op: ReduceOp | None) -> bool:
        """Whether the native engine has what the call needs."""
        return bool(self.native.supports(dtypes.code(dtype), _OPERATIONS.index(op) + 1 if op is not None else 0))

    def algorithm(self, collective: str, nbytes: int) -> str:
        """`direct`, or for a small all_reduce `one_hop`."""
        return "one_hop" if collective == "all_reduce" and nbytes <= _native.largest_in_slot else "direct"

    def bytes_of_direct_all_reduce(self, nbytes: int) -> tuple[int, ...]:
        """What every rank sends: the shares of the others, and its own to each. Shares are cut at lines of 64 bytes."""
        size, lines = len(self.members), -(-nbytes // 64)
        ends = [min(nbytes, 64 * ((rank + 1) * (lines // size) + min(rank + 1, lines % size))) for rank in range(size)]
        own = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        return tuple(nbytes + (size - 2) * share for share in own)

    def plan(self, call: Call) -> Any:
        """The native plan of a call: worked out once, then looked up."""
        return self.native.plan(
            _INDEX[call.collective],
            dtypes.code(call.dtype),
            call.dtype.itemsize,
            _OPERATIONS.index(call.op) + 1 if call.op is not None else 0,
            call.root,
            list(call.blocks) or [call.count],
            call.label(),
        )

    def start(self, call: Call, source: Array, target: Array, alone: bool) -> Any:
        """Start a collective; returns its handle, for `poll` and `wait`. `alone`: it must advance while nobody waits for it."""
        self.check()
        pending = self.native.start(self.plan(call), source.ctypes.data, target.ctypes.data, alone)
        return self.keep(pending, (source, target))

    def fix(self, call: Call, source: Array, target: Array) -> Any:
        """A call that can be made again and again on the same arrays; its caller keeps them alive."""
        return _native.FixedCall(self.native, self.plan(call), source.ctypes.data, target.ctypes.data)

    def start_schedule(
        self,
        call: Call,
        source: Array,
        target: Array,
        schedule: Schedule,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        make_plan: Callable[[], Plan],
        *,
        in_place: bool,
        known: bool,
        alone: bool,
    ) -> Any:
        """Start a call of any schedule; otherwise as `start`. `known`: the label tells the counts of all blocks."""
        self.check()
        native, label, counts = self.native, call.label(), () if known else (*inputs, *outputs)
        arguments = (label, in_place, counts, source.ctypes.data, target.ctypes.data, alone)
        pending = native.start_schedule(*arguments)
        if pending is None:
            plan = make_plan()
            program = [instruction for row in schedule.program(self.rank) for instruction in row]
            native.keep_schedule(
                label,
                in_place,
                counts,
                _INDEX[call.collective],
                dtypes.code(call.dtype),
                call.dtype.itemsize,
                _OPERATIONS.index(call.op) + 1 if call.op is not None else 0,
                sum(inputs),
                sum(outputs),
                plan.scratch_elements,
                _rows(plan),
                # Also ranks to which no element goes are told which call this is.
                _queues((i.peer for i in program if i.kind is Kind.SEND), plan.sends),
                _queues((i.peer for i in program if i.kind in (Kind.RECV, Kind.RECV_REDUCE)), plan.receives),
            )
            pending = native.start_schedule(*arguments)
        return self.keep(pending, (source, target))

    def post(self, call: Call, sends: bool, peer: int, tag: int, array: Array, alone: bool) -> Any:
        """Start a send or a recv; otherwise as `start`."""
        self.check()
        pending = self.native.post(sends, peer, tag, call.label(), array.ctypes.data, array.nbytes, alone)
        return self.keep(pending, array)

    def keep(self, pending: Any, arrays: object) -> Any:
        """Hold the arrays until the call is done: the engine touches them even if the caller forgets it."""
        for earlier in tuple(self._in_flight):  # another thread may start a call meanwhile
            if earlier.done:
                self._in_flight.pop(earlier, None)
        if not pending.done:
            self._in_flight[pending] = arrays
        return pending

    def check(self) -> None:
        """Raise what has failed the job, if anything has."""
        try:
            self.transport.progress(0.0)
        except JobFailed as error:
            raise exception_of(error.failure, self.transport.rank) from None

    def poll(self, pending: Any) -> bool:
        """Advance; returns whether the call is done."""
        return bool(self.native.poll(pending))

    def wait(self, pending: Any, timeout: float) -> None:
        """Wait for a call; raises CollectiveTimeout, CollectiveMismatch, or what the failing rank met."""
        self.native.wait(pending, timeout)

    def records(self) -> dict[str, tuple[int, float, list[int], list[int]]]:
        """Collective -> (calls, seconds in calls, bytes sent to each rank, bytes received from each rank)."""
        return {name: self.native.record(index) for name, index in _INDEX.items()}

    def _look(
        self,
        label: bytes,
        call: int,
        seconds: float,
        awaited: list[int],
        last: list[tuple[int, bytes]],
        interrupt: BaseException | None,
        timeout: float | None,
    ) -> None:
        """Called every 20 ms of a wait: raises when there is nothing to wait for any more.

        `interrupt`: what a signal handler raised meanwhile. `timeout`: of this wait, where it is not the communicator's.
        """
        timeout = self.timeout if timeout is None else timeout
        try:
            if interrupt is not None:
                raise interrupt
            self.transport.progress(0.0)
            gone = {rank for rank in awaited if self.transport.has_left(self.members[rank])}
            seen_call, seen = self._left
            self._left = (call, gone)
            # What a rank stored before it said goodbye is visible at the next look.
            lost = sorted(gone & seen) if seen_call == call else []
            if lost:
                raise self.transport.lose(self.members[lost[0]])
            if self.native.failed:
                rank = self.transport.rank
                self._fail(Aborted(f"an earlier call of this communicator failed on rank {rank}"), label, call)
            if seconds > timeout:
                self._fail(
                    CollectiveTimeout(_timeout_message(describe(label), call, timeout, awaited, last)), label, call
                )
        except JobFailed as error:
            self._fail(exception_of(error.failure, self.transport.rank), label, call)
        except CommunicationError:
            raise
        except BaseException as error:
            rank = self.transport.rank
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            self.transport.abort(Failure("Aborted", rank, f"rank {rank} stopped in {describe(label)}: {reason}"))
            raise

    def _mismatch(
        self, peer: int, ours: bytes, theirs: bytes, call: int, expected_bytes: int, their_bytes: int
    ) -> NoReturn:
        if expected_bytes != their_bytes:
            detail = f"{their_bytes} bytes come where {expected_bytes} were expected: the element counts differ"
        else:
            detail = (
                "make the same calls in the same order, with the same dtype, operation, count and root, on all ranks"
            )
            detail += difference(ours, theirs)
        self._fail(
            CollectiveMismatch(
                f"call {call} differs between ranks: rank {self.rank} called {describe(ours)}, "
                f"rank {peer} called {describe(theirs)}; {detail}"
            ),
            ours,
            call,
        )

    def _fail(self, error: CommunicationError, label: bytes, call: int) -> NoReturn:
        rank = self.transport.rank
        error.add_note(f"in call {call} of this communicator on rank {rank}: {describe(label)}")
        self.transport.abort(Failure(type(error).__name__, rank, str(error)))
        raise error from None


_alive: Final[weakref.WeakSet[Mapped]] = weakref.WeakSet()


def retire(transport: Transport | None = None) -> None:
    """Let no communicator of this transport (None: of any) touch shared memory any more."""
    for mapped in list(_alive):
        if transport is None or mapped.transport is transport:
            mapped.native.fail()


# A forked child is not a rank: it has the boards mapped still, and must not write there.
os.register_at_fork(after_in_child=retire)


def _rows(plan: Plan) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The tasks as the numbers of a TaskRow in native/task_table.hpp, and their dependents."""
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for task in plan.tasks:
        source, target = task.source or task.target, task.target or task.source
        assert source is not None and target is not None
        numbers = (
            _KINDS.index(task.kind), task.peer or 0, _BUFFERS.index(source.buffer), source.start,
            _BUFFERS.index(target.buffer), target.start, target.stop - target.start, task.contributions, task.stride,
            task.waits,
        )  # fmt: skip
        rows.append((numbers, task.dependents))
    return rows


def _queues(peers: Iterable[int | None], tasks: Mapping[int, tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    return [(peer, tasks.get(peer, ())) for peer in dict.fromkeys(peers) if peer is not None]


def _timeout_message(call: str, number: int, timeout: float, awaited: list[int], last: list[tuple[int, bytes]]) -> str:
    waiting = "; ".join(
        f"rank {rank} (its last call was {f'number {count}, {describe(label)}' if count else 'none yet'})"
        for rank, (count, label) in zip(awaited, last, strict=True)
    )
    return (
        f"call {number}, {call}, was not finished after {timeout:g} s; still waiting for {waiting}. "
        "Those ranks have not called it, or are slower than the timeout: see COLLECTIVES_TIMEOUT and init(timeout=…)"
    )
