"""`Communicator`: the collectives as methods, on the arrays that a user has."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Any, Final, Literal, Self, TypeVar, cast, overload

import numpy as np
from numpy.typing import DTypeLike

from collectives.algorithms import find
from collectives.arguments import block_shape, check_counts, check_tag, check_total, integer
from collectives.arrays import Array, Operand, nothing, output_for, result_of
from collectives.mapped import NoFastPath, new_board
from collectives.runner import Op, Runner
from collectives.schedule import Ref, recv, send
from collectives.select import Explanation, explain
from collectives.spec import COLLECTIVES
from collectives.stats import Stats, frozen
from collectives.work import PersistentCall, Work
from kernels import ReduceOp, dtypes
from transports.errors import Failure
from transports.shm import ShmTransport

X = TypeVar("X")

_LARGEST_ARRAY: Final = (1 << 63) - 1
_NO_ROOM: Final = -1
"""In place of a board's offset."""
_COLOR: Final = "a whole number from 0 that fits 64 bits, or None to be in no group"
_KEY: Final = "a whole number that fits 64 bits"


class Communicator(Runner):
    """A group of ranks that call collectives together; made by `collectives.init`, `split` and `dup`.

    Every collective must be called by all ranks of the communicator, in the same order, with the same dtype, count, op and
    root; a call that differs raises CollectiveMismatch on every rank. Results have the same bits on all ranks. Any call
    raises PeerLost, CollectiveTimeout or CollectiveMismatch when the job has failed, with the original cause; TypeError or
    ValueError for wrong arguments, before anything is sent. With `async_op=True` a call returns a `Work` at once.

    Arrays are numpy arrays, or anything with the buffer protocol or `__dlpack__` on the CPU, of any shape and stride.
    """

    # Collectives

    @overload
    def all_reduce(self, x: X, op: Op = ..., *, async_op: Literal[False] = ...) -> X: ...
    @overload
    def all_reduce(self, x: X, op: Op = ..., *, async_op: Literal[True]) -> Work[X]: ...
    def all_reduce(self, x: X, op: Op = ReduceOp.SUM, *, async_op: bool = False) -> X | Work[X]:
        """Reduce `x` over all ranks, in place; returns `x`."""
        if not async_op and self._fast.all_reduce(x, op):
            return x
        array = Operand(x, "x", writable=True)
        counts = (array.flat.size,)
        result: X | Work[X] = self._collective("all_reduce", array, array, counts, counts, x, op=op, async_op=async_op)
        return result

    def all_gather(self, x: object, out: object | None = None, *, async_op: bool = False) -> Any:
        """Gather `x` of all ranks; returns `out`, by default a new array of shape (size, *x.shape)."""
        if not async_op and self._fast.all_gather(x, out):
            return out
        array = Operand(x, "x")
        target = output_for(out, (self.size, *array.array.shape), array.array, "all_gather")
        counts = (array.flat.size,)
        return self._collective(
            "all_gather", array, target, counts, counts * self.size, result_of(out, target), async_op=async_op
        )

    def reduce_scatter(
        self, x: object, out: object | None = None, op: Op = ReduceOp.SUM, *, async_op: bool = False
    ) -> Any:
        """Reduce `x` over all ranks and keep block `rank` of its first dimension; returns `out`.

        The first dimension (or, failing that, the element count, for a flat result) must be a multiple of the size; see
        `reduce_scatter_v` for uneven blocks.
        """
        if not async_op and self._fast.reduce_scatter(x, out, op):
            return out
        array = Operand(x, "x")
        target = output_for(out, block_shape(array.array, self.size, "reduce_scatter"), array.array, "reduce_scatter")
        counts = (target.flat.size,)
        return self._collective(
            "reduce_scatter",
            array,
            target,
            counts * self.size,
            counts,
            result_of(out, target),
            op=op,
            async_op=async_op,
        )

    def broadcast(self, x: X, root: int = 0, *, async_op: bool = False) -> Any:
        """Copy the root's `x` into `x` on all other ranks; returns `x`."""
        if not async_op and self._fast.broadcast(x, root):
            return x
        root = self._check_root(root)
        array = Operand(x, "x", writable=self.rank != root)
        counts = (array.flat.size,)
        inputs = counts if self.rank == root else ()
        return self._collective("broadcast", array, array, inputs, counts, x, root=root, async_op=async_op)

    def reduce(
        self,
        x: object,
        root: int = 0,
        op: Op = ReduceOp.SUM,
        out: object | None = None,
        *,
        async_op: bool = False,
    ) -> Any:
        """Reduce `x` over all ranks to the root; returns `out` (by default a new array) there and None elsewhere."""
        if not async_op and self._fast.reduce(x, root, op, out):
            return out if self.rank == root else None
        root = self._check_root(root)
        array = Operand(x, "x")
        target = output_for(out, array.array.shape, array.array, "reduce") if self.rank == root else nothing(array)
        counts = (array.flat.size,)
        outputs = counts if self.rank == root else ()
        result = result_of(out, target) if self.rank == root else None
        return self._collective("reduce", array, target, counts, outputs, result, op=op, root=root, async_op=async_op)

    def gather(self, x: object, root: int = 0, out: object | None = None, *, async_op: bool = False) -> Any:
        """Gather `x` of all ranks at the root; returns `out`, of shape (size, *x.shape), there and None elsewhere."""
        if not async_op and self._fast.gather(x, root, out):
            return out if self.rank == root else None
        root = self._check_root(root)
        array = Operand(x, "x")
        counts = (array.flat.size,)
        if self.rank != root:
            return self._collective("gather", array, nothing(array), counts, (), None, root=root, async_op=async_op)
        target = output_for(out, (self.size, *array.array.shape), array.array, "gather")
        result = result_of(out, target)
        return self._collective(
            "gather", array, target, counts, counts * self.size, result, root=root, async_op=async_op
        )

    def scatter(self, x: object | None, root: int = 0, out: object | None = None, *, async_op: bool = False) -> Any:
        """Send block r of the root's `x` to rank r; returns `out`, which ranks other than the root must give (`x` is None there)."""
        if not async_op and self._fast.scatter(x, root, out):
            return out
        root = self._check_root(root)
        if self.rank == root:
            array = Operand(x, "x")
            target = output_for(out, block_shape(array.array, self.size, "scatter"), array.array, "scatter")
            inputs = (target.flat.size,) * self.size
        else:
            if out is None:
                raise ValueError(
                    f"scatter: rank {self.rank} is not the root, so it must pass out, where its block goes"
                )
            target = Operand(out, "out", writable=True)
            array, inputs = nothing(target), ()
        counts = (target.flat.size,)
        return self._collective(
            "scatter", array, target, inputs, counts, result_of(out, target), root=root, async_op=async_op
        )

    def all_to_all(self, x: object, out: object | None = None, *, async_op: bool = False) -> Any:
        """Send block r of `x` to rank r; returns `out`, shaped as `x`, whose block s came from rank s."""
        if not async_op and self._fast.all_to_all(x, out):
            return out
        array = Operand(x, "x")
        block_shape(array.array, self.size, "all_to_all")
        target = output_for(out, array.array.shape, array.array, "all_to_all")
        counts = (array.flat.size // self.size,) * self.size
        return self._collective("all_to_all", array, target, counts, counts, result_of(out, target), async_op=async_op)

    def scan(self, x: X, op: Op = ReduceOp.SUM, *, async_op: bool = False) -> Any:
        """Reduce the `x` of ranks 0 to `rank` into `x` (inclusive prefix), in place; returns `x`."""
        if not async_op and self._fast.scan(x, op):
            return x
        array = Operand(x, "x", writable=True)
        counts = (array.flat.size,)
        return self._collective("scan", array, array, counts, counts, x, op=op, async_op=async_op)

    def barrier(self) -> None:
        """Return when every rank has called."""
        if self._fast.barrier():
            return
        token, tokens = Operand(np.zeros(1, np.uint8), "token"), Operand(np.zeros(self.size, np.uint8), "tokens")
        self._collective("barrier", token, tokens, (1,), (1,) * self.size, None)

    # Planned once, called many times

    def plan_all_reduce(self, x: object, op: Op = ReduceOp.SUM) -> PersistentCall:
        """`all_reduce` of this `x`, planned once."""
        return self._plan(Communicator.all_reduce, x, op)

    def plan_all_gather(self, x: object, out: object | None = None) -> PersistentCall:
        """`all_gather` of this `x`, planned once; the result lies in the same array every time."""
        return self._plan(Communicator.all_gather, x, out)

    def plan_reduce_scatter(self, x: object, out: object | None = None, op: Op = ReduceOp.SUM) -> PersistentCall:
        """`reduce_scatter` of this `x`, planned once; the result lies in the same array every time."""
        return self._plan(Communicator.reduce_scatter, x, out, op)

    def plan_broadcast(self, x: object, root: int = 0) -> PersistentCall:
        """`broadcast` of this `x`, planned once."""
        return self._plan(Communicator.broadcast, x, root)

    def plan_all_to_all(self, x: object, out: object | None = None) -> PersistentCall:
        """`all_to_all` of this `x`, planned once; the result lies in the same array every time."""
        return self._plan(Communicator.all_to_all, x, out)

    def _plan(self, method: Callable[..., Any], *arguments: Any) -> PersistentCall:
        planner = copy.copy(self)
        planner._plans_for = self
        planned: PersistentCall = method(planner, *arguments, async_op=True)
        return planned

    # Uneven blocks

    def all_gather_v(
        self, x: object, counts: Sequence[int], out: object | None = None, *, async_op: bool = False
    ) -> Any:
        """As `all_gather`, with `counts[r]` elements from rank r (zero included), known to all ranks; returns a flat `out`."""
        array = Operand(x, "x")
        counts = check_counts(counts, self.size, "counts", "all_gather_v")
        check_total(array.array, counts[self.rank : self.rank + 1], "all_gather_v", f"counts[{self.rank}]")
        target = output_for(out, (sum(counts),), array.array, "all_gather_v")
        inputs = (counts[self.rank],)
        return self._collective(
            "all_gather", array, target, inputs, counts, result_of(out, target), blocks=counts, async_op=async_op
        )

    def reduce_scatter_v(
        self,
        x: object,
        counts: Sequence[int],
        out: object | None = None,
        op: Op = ReduceOp.SUM,
        *,
        async_op: bool = False,
    ) -> Any:
        """As `reduce_scatter`, with `counts[r]` elements to rank r (zero included); returns a flat `out`."""
        array = Operand(x, "x")
        counts = check_counts(counts, self.size, "counts", "reduce_scatter_v")
        check_total(array.array, counts, "reduce_scatter_v", "sum(counts)")
        target = output_for(out, (counts[self.rank],), array.array, "reduce_scatter_v")
        outputs = (counts[self.rank],)
        return self._collective(
            "reduce_scatter",
            array,
            target,
            counts,
            outputs,
            result_of(out, target),
            op=op,
            blocks=counts,
            async_op=async_op,
        )

    def all_to_all_v(
        self,
        x: object,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        out: object | None = None,
        *,
        async_op: bool = False,
    ) -> Any:
        """As `all_to_all`, with `send_counts[r]` elements to rank r and `receive_counts[r]` from it; returns a flat `out`."""
        array = Operand(x, "x")
        inputs = check_counts(send_counts, self.size, "send_counts", "all_to_all_v")
        outputs = check_counts(receive_counts, self.size, "receive_counts", "all_to_all_v")
        check_total(array.array, inputs, "all_to_all_v", "sum(send_counts)")
        if inputs[self.rank] != outputs[self.rank]:
            raise ValueError(
                f"all_to_all_v: send_counts[{self.rank}] is {inputs[self.rank]} and receive_counts[{self.rank}] is "
                f"{outputs[self.rank]}; what this rank sends to itself must be what it receives from itself"
            )
        target = output_for(out, (sum(outputs),), array.array, "all_to_all_v")
        return self._collective(
            "all_to_all", array, target, inputs, outputs, result_of(out, target), count=0, async_op=async_op
        )

    # Point to point

    def send(self, x: object, peer: int, tag: int = 0, *, async_op: bool = False) -> Any:
        """Send `x` to `peer`; returns when `x` may be changed again, which may be before it has arrived."""
        if not async_op and self._fast.send(x, peer, tag):
            return None
        peer, tag = self._check_peer(peer, "peer"), check_tag(tag)
        array = Operand(x, "x")
        return self._point_to_point(array, send(peer, Ref("in", 0)), peer, tag, None, async_op)

    def recv(self, x: X, peer: int, tag: int = 0, *, async_op: bool = False) -> Any:
        """Receive into `x` what `peer` sends with this tag, of exactly this count and dtype; returns `x`."""
        if not async_op and self._fast.recv(x, peer, tag):
            return x
        peer, tag = self._check_peer(peer, "peer"), check_tag(tag)
        array = Operand(x, "x", writable=True)
        return self._point_to_point(array, recv(peer, Ref("out", 0)), peer, tag, x, async_op)

    def sendrecv(self, x: object, to: int, out: X, source: int, tag: int = 0) -> X:
        """Send `x` to rank `to` while receiving `out` from rank `source`; returns `out`."""
        if self._fast.sendrecv(x, to, out, source, tag):
            return out
        to, source, tag = self._check_peer(to, "to"), self._check_peer(source, "source"), check_tag(tag)
        given, taken = Operand(x, "x"), Operand(out, "out", writable=True)
        receiving = self._point_to_point(taken, recv(source, Ref("out", 0)), source, tag, out, async_op=True)
        self._point_to_point(given, send(to, Ref("in", 0)), to, tag, None, async_op=False)
        return cast("X", receiving.wait())

    # Groups and life

    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """A communicator of the ranks with the same color, ordered by (key, rank); None for a rank with color None.

        Collective over this communicator, also for ranks with color None. Raises MemoryError on all of them where one has no
        shared memory left.
        """
        if color is not None:
            color = integer(color, "split: color", _COLOR)
            if not 0 <= color < 1 << 63:
                raise ValueError(f"split: color is {color}; expected {_COLOR}")
        key = integer(key, "split: key", _KEY)
        if not -(1 << 63) <= key < 1 << 63:
            raise ValueError(f"split: key is {key}; expected {_KEY}")
        transport, board, reason = self._job.transport, None, None
        try:
            board = new_board(transport, self.size) if color is not None else None
        except MemoryError as error:
            board, reason = _NO_ROOM, error
        mine = np.array([-1 if color is None else color, key, self._job.next_context, board or 0], np.int64)
        everyone = self.all_gather(mine)
        context = int(everyone[:, 2].max())
        self._job.next_context = context + 1
        lacking = [rank for rank, row in enumerate(everyone) if row[3] == _NO_ROOM]
        if lacking:
            if isinstance(transport, ShmTransport) and board not in (None, _NO_ROOM):
                transport.heap.free(board)
            raise MemoryError(
                f"split: rank {', '.join(map(str, lacking))} has no shared memory left for another communicator"
            ) from reason
        if color is None:
            return None
        group = [
            rank for _, rank in sorted((int(row[1]), rank) for rank, row in enumerate(everyone) if row[0] == color)
        ]
        boards = [int(everyone[rank, 3]) for rank in group] if board is not None else None
        members = [self._members[rank] for rank in group]
        return Communicator(self._job, members, context, self.timeout, boards, deterministic=self.deterministic)

    def dup(self) -> Communicator:
        """A communicator of the same ranks whose messages, order of calls and stats are its own."""
        duplicate = self.split(0, self.rank)
        assert duplicate is not None
        return duplicate

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        """An uninitialised array in the shared heap, on which collectives copy nothing; ordinary memory without one.

        Its memory is reserved here, and given back when the last view of the array is gone. Raises MemoryError; TypeError
        for a dtype that cannot travel.
        """
        kind = np.dtype(dtype)
        dtypes.check(kind, "empty: the array")
        given = tuple(shape) if np.iterable(shape) else (shape,)
        dims = tuple(integer(length, "empty: shape", "whole numbers from 0") for length in given)
        if min(dims, default=0) < 0:
            raise ValueError(f"empty: shape is {shape}; expected whole numbers from 0")
        nbytes = math.prod(dims) * kind.itemsize
        if nbytes > _LARGEST_ARRAY:
            raise MemoryError(f"empty: shape {shape} of {kind} takes {nbytes} bytes, more than there are addresses")
        transport = self._job.transport
        if not isinstance(transport, ShmTransport):
            return np.empty(dims, kind)
        heap, offset = transport.heap, transport.heap.allocate(nbytes)
        memory: Array = np.frombuffer(heap.mapping.view(offset, nbytes), np.uint8)
        weakref.finalize(memory, heap.free, offset).atexit = False
        return memory.view(kind).reshape(dims)

    @property
    def maps_memory(self) -> bool:
        """Whether the ranks of this communicator load and store each other's memory."""
        return self._mapped is not None

    def explain(self, collective: str, nbytes: int, *, dtype: DTypeLike = np.float32, root: int = 0) -> Explanation:
        """Which algorithm a call runs whose whole buffer has `nbytes`, and why; sends nothing.

        The whole buffer is the larger of input and output, at the root where there is one, here in blocks of equal counts.
        """
        if collective not in COLLECTIVES:
            find(collective, "")
        self._check_root(root)
        job, mapped, kind = self._job, self._mapped, np.dtype(dtype)
        chosen = job.algorithms.get(collective)
        if mapped is not None and chosen is None:
            chosen = mapped.algorithm(collective, nbytes)
        found = explain(
            collective, nbytes, kind.itemsize, self.size, root, job.transport.name, job.costs, job.slice_bytes,
            deterministic=self.deterministic, algorithm=chosen,
        )  # fmt: skip
        if mapped is not None and collective == "all_reduce" and chosen == "direct":
            found = replace(found, bytes_sent=mapped.bytes_of_direct_all_reduce(nbytes))
        return found

    def close(self) -> None:
        """Leave: ranks that still wait for this one raise PeerLost. Safe to repeat; the world's close ends the transport."""
        self._closed = True
        self._fast = NoFastPath()
        if self._mapped is not None:
            self._mapped.native.close()
        if self._context == 0:
            self._job.close()

    def abort(self, reason: str) -> None:
        """End the job: every rank raises `Aborted` with this reason in its current or next call."""
        rank = self._job.transport.rank
        self._job.transport.abort(Failure("Aborted", rank, f"rank {rank} called abort: {reason}"))

    @property
    def stats(self) -> Stats:
        """A snapshot of what this communicator has done on this rank."""
        local = {world: rank for rank, world in enumerate(self._members)}
        sent = {name: {local[peer]: n for peer, n in ledger.sent.items()} for name, ledger in self._ledgers.items()}
        received = {
            name: {local[peer]: n for peer, n in ledger.received.items()} for name, ledger in self._ledgers.items()
        }
        calls, waited = dict(self._calls), dict(self._waited)
        for name, record in self._mapped.records().items() if self._mapped is not None else ():
            if record[0]:
                calls[name] = calls.get(name, 0) + record[0]
                waited[name] = waited.get(name, 0.0) + record[1]
                for known, bytes_by_rank in ((sent, record[2]), (received, record[3])):
                    peers = known.setdefault(name, {})
                    for peer, nbytes in enumerate(bytes_by_rank):
                        if nbytes:
                            peers[peer] = peers.get(peer, 0) + nbytes
        return Stats(
            frozen(sent), frozen(received), MappingProxyType(calls), MappingProxyType(waited)
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            # The connections stay until the process ends, so that a launcher sees this rank end before those it told.
            self.abort(f"{type(error).__name__}: {error}")

    def __repr__(self) -> str:
        return f"<Communicator rank {self.rank} of {self.size} over {self._job.transport.name}>"
