"""Ranks as threads of this process, to try and to test code that uses a communicator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from collectives.communicator import Communicator
from collectives.job import Job
from transports.inproc import InprocTransport, run_threads

Result = TypeVar("Result")


def run_ranks(
    size: int,
    function: Callable[[Communicator], Result],
    *,
    timeout: float = 60.0,
    slice_bytes: int | None = None,
    algorithms: Mapping[str, str] | None = None,
    deterministic: bool = False,
) -> list[Result]:
    """Call `function(comm)` once per rank, each in a thread of its own; returns the results in the order of the ranks.

    The first exception that a rank raises ends the others and is raised here. `timeout` (seconds) bounds every call and the
    whole run; `slice_bytes` sets the engine's slices; `algorithms` (collective -> name) those that run, in place of the cheapest;
    `deterministic` is as in `init`.
    """

    def rank(transport: InprocTransport) -> Result:
        job = Job(transport, slice_bytes, algorithms=algorithms)
        return function(Communicator(job, range(size), 0, timeout, deterministic=deterministic))

    return run_threads(size, rank, timeout)
