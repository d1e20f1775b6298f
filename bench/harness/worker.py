"""One rank of a contestants' job: runs what the driver asks for, and is blocked in a read when it asks for nothing.

Started as `python -m bench.harness.worker SPECIFICATION`, once a rank, by the launcher of the library that it serves.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bench.harness.case import COPY, ITEM_BYTES, Array, Call, Case, cases
from bench.harness.contestants import Contestant, Unavailable, join
from bench.harness.protocol import Channel, Message
from transports import environment


@dataclass(frozen=True)
class Specification:
    """What the driver wants of the ranks of a job."""

    address: str
    job: str
    contestants: list[str]
    cores: list[int]
    """Rank r runs on core r, or r modulo their number."""
    store: str | None = None

    def encode(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


@dataclass
class _Prepared:
    """A case at a size for one contestant: its arrays, and what they must hold."""

    call: Call
    contestant: Contestant
    given: Array
    expected: Array
    in_place: bool
    fresh: bool
    x: Array = field(init=False)
    out: Array = field(init=False)
    views: tuple[Any, Any] = field(init=False)

    def allocate(self) -> None:
        make = self.contestant.empty or (_fresh if self.fresh else _ordinary)
        self.x = make(len(self.given))
        self.out = self.x if self.in_place else make(len(self.expected))
        self.views = (self.contestant.view(self.x), self.contestant.view(self.out))

    def fill(self) -> None:
        """Put the input in place, and something that is never right where the output goes."""
        if self.fresh:
            self.allocate()
        elif not self.in_place:
            self.out.fill(-1)
        np.copyto(self.x, self.given)

    def run(self, repeats: int) -> float:
        """Seconds of one run, as the mean of so many in a row."""
        call, comm, (x, out) = self.call, self.contestant.comm, self.views
        began = time.perf_counter()
        for _ in range(repeats):
            call(comm, x, out)
        return (time.perf_counter() - began) / repeats

    def wrong(self) -> int:
        found = self.out[: len(self.expected)]
        return 0 if np.array_equal(found, self.expected) else int(np.count_nonzero(found != self.expected))


def _ordinary(count: int) -> Array:
    return np.empty(count, np.float32)


def _fresh(count: int) -> Array:
    """Pages that the process has never touched."""
    return np.frombuffer(mmap.mmap(-1, max(1, count * ITEM_BYTES)), np.float32)[:count]


class Worker:
    """Takes the steps that the driver's messages name."""

    def __init__(self, rank: int, size: int, contestants: dict[str, Contestant]) -> None:
        self._rank, self._size, self._contestants = rank, size, contestants
        self._data: dict[tuple[str, int], tuple[Array, Array]] = {}
        self._prepared: dict[tuple[str, str], _Prepared] = {}
        self.steps: dict[str, Callable[..., Message]] = {
            "prepare": self.prepare,
            "ready": self.ready,
            "go": self.go,
            "release": self.release,
        }

    def prepare(self, case: str, contestant: str, count: int, fresh: bool, calibrate: int) -> Message:
        """Make the arrays, warm up, and say how long one run takes, from `calibrate` runs (0: it is not asked)."""
        found = COPY if case == COPY.name else cases()[case]
        call = _call(found, self._contestants[contestant])
        if (case, count) not in self._data:
            self._data[case, count] = found.data(self._rank, self._size, count)
        prepared = _Prepared(call, self._contestants[contestant], *self._data[case, count], found.in_place, fresh)
        self._prepared[case, contestant] = prepared
        prepared.allocate()
        prepared.x.fill(0)
        prepared.run(1)
        prepared.contestant.barrier()
        return {"seconds": prepared.run(calibrate) if calibrate else 0.0}

    def ready(self, case: str, contestant: str, check: bool) -> Message:
        """Fill the arrays; with `check` run once, compare, and leave zeros, which stay zeros however often they are added."""
        prepared = self._prepared[case, contestant]
        prepared.fill()
        if not check:
            return {}
        prepared.run(1)
        wrong = prepared.wrong()
        prepared.x.fill(0)
        return {"wrong": wrong}

    def go(self, case: str, contestant: str, repeats: int, check: bool) -> Message:
        """All ranks are ready: meet at the contestant's own barrier, and time; with `check` compare afterwards."""
        prepared = self._prepared[case, contestant]
        prepared.contestant.barrier()
        seconds = prepared.run(repeats)
        return {"seconds": seconds, "wrong": prepared.wrong() if check else 0}

    def release(self) -> Message:
        """Let go of all arrays."""
        self._prepared.clear()
        self._data.clear()
        return {}


def _call(case: Case, contestant: Contestant) -> Call:
    call = contestant.call(case)
    if call is None:
        raise Unavailable(f"it has no {case.name}")
    return call


def serve(specification: Specification) -> None:
    """Join as every contestant of the specification, say to the driver which could, and answer it until it hangs up."""
    world = environment.detect()
    pin = {specification.cores[world.rank % len(specification.cores)]}
    os.sched_setaffinity(0, pin)  # before libraries start threads, which inherit it
    channel = Channel.connect(specification.address)
    joined: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for name in specification.contestants:
        try:
            joined[name] = join(name, specification.store, world.size > len(specification.cores))
        except Unavailable as error:
            missing[name] = str(error)
    os.sched_setaffinity(0, pin)  # MPI libraries bind their ranks too, each in its own way
    descriptions = {name: contestant.description for name, contestant in joined.items()}
    channel.send({"job": specification.job, "rank": world.rank, "joined": descriptions, "missing": missing})
    channel.serve(Worker(world.rank, world.size, joined).steps)


if __name__ == "__main__":
    serve(Specification(**json.loads(sys.argv[1])))
