"""How a call of a communicator runs: natively over shared memory, or by the reference engine over messages."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final

import numpy as np

import kernels
from collectives.algorithms import Algorithm, find
from collectives.arguments import integer
from collectives.arrays import Operand, check_apart
from collectives.calls import Call
from collectives.engine import Execution
from collectives.job import Job
from collectives.mapped import Mapped, NoFastPath
from collectives.plan import Plan, compile_plan
from collectives.schedule import Schedule
from collectives.select import LARGE_MESSAGE, choose
from collectives.spec import COLLECTIVES
from collectives.work import MappedPersistentCall, PersistentCall, Work
from kernels import PremultipliedSum, ReduceOp
from transports.base import Ledger
from transports.shm import ShmTransport

Op = ReduceOp | PremultipliedSum

_POINT_TO_POINT: Final = 1 << 31
"""Added to a communicator's context: its messages of send and recv, with the tag in place of the sequence number."""


class Runner:
    """What `Communicator` is made on: its state, and the way of a call whose arguments are operands by now."""

    def __init__(
        self,
        job: Job,
        members: Sequence[int],
        context: int,
        timeout: float,
        boards: Sequence[int] | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        self.rank: Final = members.index(job.transport.rank)
        self.size: Final = len(members)
        self._timeout = timeout
        self.deterministic: Final = deterministic
        """Whether reductions are made in rank order, rounded once; kept by `split` and `dup`."""
        self._job, self._members, self._context = job, tuple(members), context
        self._sequence = 0
        self._ledgers: dict[str, Ledger] = defaultdict(Ledger)
        self._calls: dict[str, int] = defaultdict(int)
        self._waited: dict[str, float] = defaultdict(float)
        self._closed = False
        self._plans_for: Runner | None = None
        """Of a copy whose collectives return persistent calls: the communicator that these run on."""
        self._mapped: Mapped | None = None
        self._fast: Any = NoFastPath()
        if boards is not None and isinstance(job.transport, ShmTransport):
            forced = {name: _how(algorithm, job) for name, algorithm in job.algorithms.items()}
            self._mapped = Mapped(job.transport, self._members, boards, timeout, forced)
            self._fast = self._mapped.native

    @property
    def timeout(self) -> float:
        """Seconds after which a call raises CollectiveTimeout; may be set."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        """Set it for calls made from now on."""
        self._timeout = seconds
        if self._mapped is not None:
            self._mapped.timeout = seconds

    # How a call runs

    def _collective(
        self,
        name: str,
        source: Operand,
        target: Operand,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        result: object,
        *,
        op: Op | None = None,
        root: int = 0,
        count: int | None = None,
        blocks: tuple[int, ...] = (),
        async_op: bool = False,
    ) -> Any:
        self._check_open()
        dtype = source.flat.dtype
        caller = self._plans_for or self

        def again() -> Any:
            source.read_again()
            return caller._collective(
                name,
                source,
                target,
                inputs,
                outputs,
                result,
                op=op,
                root=root,
                count=count,
                blocks=blocks,
                async_op=True,
            )

        if self._plans_for and (
            self._mapped is None or source.strided or target.strided or isinstance(op, PremultipliedSum)
        ):
            return PersistentCall(again)
        named_op, scale_after = self._prepare(name, op, source, target, dtype, outputs)
        call = Call(
            name, dtype, sum(blocks) if blocks else count if count is not None else max(inputs + outputs, default=0),
            named_op, root, blocks,
        )  # fmt: skip
        mapped = self._mapped if self._mapped is not None and self._mapped.serves(dtype, named_op) else None
        if mapped is not None and count is None and name not in self._job.algorithms:
            self._in_place(name, source, target, inputs, outputs, root, True)
            if self._plans_for:
                fixed = mapped.fix(call, source.flat, target.flat)
                return MappedPersistentCall(fixed, result, (source.flat, target.flat), mapped.check, mapped.keep)
            pending = mapped.start(call, source.flat, target.flat, async_op)
            return self._pending(mapped, pending, name, target if target.strided else None, result, async_op)
        if self._plans_for:
            return PersistentCall(again)
        algorithm = self._algorithm(
            name, max(inputs + outputs, default=0) * dtype.itemsize, blocks, count is None, mapped is not None
        )
        call = replace(call, how=_how(algorithm.name, self._job))
        slice_elements = max(1, self._job.slice_bytes // dtype.itemsize)
        in_place = self._in_place(name, source, target, inputs, outputs, root, algorithm.in_place)
        schedule = algorithm.schedule(self.size, root)
        if mapped is not None:
            pending = mapped.start_schedule(
                call, source.flat, target.flat, schedule, inputs, outputs,
                lambda: compile_plan(schedule, self.rank, inputs, outputs, slice_elements, in_place=in_place),
                in_place=in_place, known=count is None and not blocks, alone=async_op,
            )  # fmt: skip
            return self._pending(mapped, pending, name, target if target.strided else None, result, async_op)
        plan = _cached_plan(schedule, self.rank, inputs, outputs, slice_elements, in_place)

        def finish() -> None:
            if scale_after is not None:
                kernels.scale(target.flat, scale_after)
            target.write_back()

        self._sequence += 1
        channel = (self._context << 32) | (self._sequence & 0xFFFFFFFF)
        run_op = ReduceOp.SUM if named_op is ReduceOp.AVG else named_op
        arrays = {"in": source.flat, "out": target.flat}
        execution = Execution(
            call, self._sequence, plan, arrays, self._members, channel, self._ledgers[name], run_op, finish
        )
        return self._launch(name, execution, result, async_op)

    def _algorithm(self, name: str, block_bytes: int, blocks: tuple[int, ...], known: bool, mapped: bool) -> Algorithm:
        """The algorithm for blocks of at most `block_bytes`, if `known` to all ranks: they must all choose alike."""
        job = self._job
        if name in job.algorithms:
            forced = find(name, job.algorithms[name])
            if not known and forced.schedule(self.size).even:
                raise ValueError(f"{name} by {forced.name} needs blocks of equal counts; init with another algorithm")
            return forced
        if mapped:
            return find(name, "direct")
        spec, even = COLLECTIVES[name], not blocks and known
        whole = block_bytes * max(spec.input_blocks(self.size, 0, 0), spec.output_blocks(self.size, 0, 0))
        chosen = choose(
            name, whole if known else LARGE_MESSAGE, self.size, job.costs, job.slice_bytes,
            deterministic=self.deterministic, even=even,
        )  # fmt: skip
        return find(name, chosen)

    def _prepare(
        self, name: str, op: Op | None, source: Operand, target: Operand, dtype: np.dtype[Any], outputs: tuple[int, ...]
    ) -> tuple[ReduceOp | None, float | None]:
        """Check the operation; scale the input of a premultiplied sum; returns (op, factor for the output)."""
        if not COLLECTIVES[name].reduces:
            return None, None
        if isinstance(op, PremultipliedSum):
            kernels.check(ReduceOp.AVG, dtype)
            if target.flat is not source.flat:
                source.flat = source.flat.copy()
            kernels.scale(source.flat, op.factor)
            return ReduceOp.SUM, None
        kernels.check(op, dtype)  # type: ignore[arg-type]  # it refuses None and all else that is no operation
        return op, 1.0 / self.size if op is ReduceOp.AVG and outputs else None

    def _in_place(
        self,
        name: str,
        source: Operand,
        target: Operand,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        root: int,
        algorithm_allows: bool,
    ) -> bool:
        if not inputs or not outputs:
            return False
        shared = COLLECTIVES[name].in_place(self.size, self.rank, root)
        offset = sum(outputs[: shared[0]]) - sum(inputs[: shared[1]]) if shared is not None else None
        same = check_apart(name, source.flat, target.flat, offset)
        if same and not algorithm_allows:
            source.flat = source.flat.copy()
            return False
        return same

    def _point_to_point(
        self, array: Operand, instruction: Any, peer: int, tag: int, result: object, async_op: bool
    ) -> Any:
        self._check_open()
        dtype, count = array.flat.dtype, array.flat.size
        if self._mapped is not None:
            call = Call("send/recv", dtype, count)
            sends = instruction.target is None
            pending = self._mapped.post(call, sends, peer, tag, array.flat, async_op)
            strided = array if array.strided and not sends else None
            return self._pending(self._mapped, pending, "send/recv", strided, result, async_op)
        schedule = Schedule("all_reduce", "point to point", self.size, lambda rank: ((instruction,),))
        slice_elements = max(1, self._job.slice_bytes // dtype.itemsize)
        plan = compile_plan(schedule, self.rank, (count,), (count,), slice_elements)
        call = Call("send/recv", dtype, count, how=str(self._job.slice_bytes))
        channel = ((self._context | _POINT_TO_POINT) << 32) | tag
        arrays = {"in": array.flat, "out": array.flat}
        finish = array.write_back if instruction.target is not None else None
        execution = Execution(
            call, tag, plan, arrays, self._members, channel, self._ledgers["send/recv"], finish=finish
        )
        return self._launch("send/recv", execution, result, async_op)

    def _launch(self, name: str, execution: Execution, result: object, async_op: bool) -> Any:
        engine = self._job.engine
        self._calls[name] += 1
        self._timed(name, lambda: engine.start(execution))

        def wait(timeout: float | None) -> None:
            seconds = self.timeout if timeout is None else timeout
            self._timed(name, lambda: engine.wait(execution, seconds))

        if async_op:
            return Work(result, lambda: engine.poll(execution), wait, lambda: (execution.began, execution.ended))
        wait(None)
        return result

    def _pending(
        self, mapped: Mapped, pending: Any, name: str, strided: Operand | None, result: object, async_op: bool
    ) -> Any:
        finished = False

        def finish() -> None:
            nonlocal finished
            if not finished:
                finished = True
                if strided is not None:
                    strided.write_back()

        def poll() -> bool:
            if not mapped.poll(pending):
                return False
            finish()
            return True

        def wait(timeout: float | None) -> None:
            seconds = self.timeout if timeout is None else timeout
            self._timed(name, lambda: mapped.wait(pending, seconds))
            finish()

        if async_op:
            return Work(result, poll, wait, lambda: pending.interval)
        wait(None)
        return result

    def _timed(self, name: str, body: Callable[[], None]) -> None:
        began = time.perf_counter()
        try:
            body()
        finally:
            self._waited[name] += time.perf_counter() - began

    # Checks of arguments

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this communicator is closed; call collectives.init(), split or dup for another")

    def _check_root(self, root: int) -> int:
        expected = f"a rank, 0 to {self.size - 1}"
        root = integer(root, "root", expected)
        if not 0 <= root < self.size:
            raise ValueError(f"root is {root}; expected {expected}")
        return root

    def _check_peer(self, peer: int, name: str) -> int:
        expected = f"another rank, 0 to {self.size - 1} and not {self.rank}"
        peer = integer(peer, name, expected)
        if not 0 <= peer < self.size or peer == self.rank:
            raise ValueError(f"{name} is {peer}; expected {expected}")
        return peer


def _how(algorithm: str, job: Job) -> str:
    return f"{algorithm}/{job.slice_bytes}"


@lru_cache(maxsize=1024)
def _cached_plan(
    schedule: Schedule,
    rank: int,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    slice_elements: int,
    in_place: bool,
) -> Plan:
    return compile_plan(schedule, rank, inputs, outputs, slice_elements, in_place=in_place)
