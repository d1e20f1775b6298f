"""What all communicators of one `init` share: the transport, the engine, and the way out at exit."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import weakref
from collections.abc import Mapping
from typing import Final

from collectives.costs import default_costs
from collectives.engine import Engine
from collectives.mapped import retire
from transports.base import Transport
from transports.errors import Failure

DEFAULT_SLICE_BYTES: Final = 512 * 1024


class Job:
    """One world of ranks.

    At the interpreter's exit its transport says goodbye, so that the others can tell a rank that left from one that died;
    after an uncaught exception it passes on what was raised instead.
    """

    def __init__(
        self,
        transport: Transport,
        slice_bytes: int | None,
        learnt_fd: int | None = None,
        algorithms: Mapping[str, str] | None = None,
    ) -> None:
        self.transport = transport
        self.engine = Engine(transport)
        self.slice_bytes = slice_bytes or DEFAULT_SLICE_BYTES
        self.learnt_fd = learnt_fd
        self.costs = default_costs(transport.name)
        """What `select` goes by; equal on all ranks."""
        self.algorithms: Mapping[str, str] = algorithms or {}
        """Collective -> the algorithm that runs, whatever `select` would choose."""
        self.next_context = 1
        """Communicators are told apart by it; ranks agree on the next one in `split`."""
        weakref.finalize(self, transport.close).atexit = False
        _open_jobs.add(self)

    def close(self) -> None:
        """End the transport; safe to repeat."""
        retire(self.transport)
        self.transport.close()
        _open_jobs.discard(self)


_open_jobs: Final[weakref.WeakSet[Job]] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    error = getattr(sys, "last_value", None)
    for job in list(_open_jobs):
        if error is not None:
            rank = job.transport.rank
            job.transport.abort(Failure("PeerLost", rank, f"rank {rank} ended with {type(error).__name__}: {error}"))
            if job.transport.failure is not None and job.transport.failure.origin == rank:
                job.transport.leave_job()
                continue  # the connections end with the process: the others see who was the first
        failure = job.transport.failure
        if job.learnt_fd is not None and failure is not None and failure.origin != job.transport.rank:
            with contextlib.suppress(OSError):
                os.write(job.learnt_fd, job.transport.rank.to_bytes(4, "little"))
        job.close()
