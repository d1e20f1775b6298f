"""Ranks as threads of one process: the transport of tests and of the examples in the documentation."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from transports.base import Request, Transport
from transports.errors import Failure, JobFailed

Result = TypeVar("Result")


class InprocTransport(Transport):
    """One rank of a group made by `inproc_group`. A message is copied once, from the sender's to the receiver's memory."""

    name = "inproc"

    def __init__(self, rank: int, group: list[InprocTransport], changed: threading.Condition, size: int) -> None:
        super().__init__(rank, size)
        self._group = group
        self._changed = self._lock = changed
        self._version = self._seen = 0
        self._mismatches: deque[Exception] = deque()

    def _post_send(self, request: Request) -> None:
        with self._changed:
            receiver = self._group[request.peer]
            if receiver.closed:
                raise self._fail(_left(request.peer))
            try:
                arrival = receiver.mailbox.arriving(self.rank, request.channel, request.label, len(request.data))
            except Exception as error:  # the receiver must raise it, in its own thread
                receiver._mismatches.append(error)
            else:
                arrival.data[:] = request.data
                receiver._finish_arrival(arrival)
            receiver._version += 1
            self._changed.notify_all()
        request.ledger.sent[request.peer] += len(request.data)
        request.done = True

    def _posted_receive(self, peer: int) -> None:
        if self._group[peer].closed:
            raise self._fail(_left(peer))

    def _progress(self, timeout: float) -> bool:
        with self._changed:
            if self._version == self._seen and timeout > 0:
                self._changed.wait_for(lambda: self._version != self._seen, timeout)
            moved = self._version != self._seen
            self._seen = self._version
            if self.failure is not None:
                raise JobFailed(self.failure)
            if self._mismatches:
                raise self._mismatches.popleft()
            for peer in self.mailbox.waiting_for():
                if self._group[peer].closed:
                    raise self._fail(_left(peer))
            return moved

    def _send_failure(self, failure: Failure) -> None:
        with self._changed:
            for other in self._group:
                if other.failure is None and not other.closed:
                    other.failure = failure
                other._version += 1
            self._changed.notify_all()

    def _close(self) -> None:
        with self._changed:
            for other in self._group:
                other._version += 1
            self._changed.notify_all()


def _left(peer: int) -> Failure:
    return Failure("PeerLost", peer, f"rank {peer} closed its communicator while this rank still waits for it")


def inproc_group(size: int) -> list[InprocTransport]:
    """The transports of `size` ranks, to be used from one thread each."""
    group: list[InprocTransport] = []
    changed = threading.Condition(threading.RLock())
    group.extend(InprocTransport(rank, group, changed, size) for rank in range(size))
    return group


def run_threads(size: int, function: Callable[[InprocTransport], Result], timeout: float = 60.0) -> list[Result]:
    """Run `function(transport)` once per rank, each in a thread; returns the results in the order of the ranks.

    A rank that raises aborts the others; the first exception raised is raised again here. Raises TimeoutError, naming the
    ranks, if some have not returned after `timeout` seconds.
    """
    group = inproc_group(size)
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def body(transport: InprocTransport) -> None:
        try:
            results[transport.rank] = function(transport)
        except BaseException as error:
            errors.append(error)
            transport.abort(
                Failure("PeerLost", transport.rank, f"rank {transport.rank} raised {type(error).__name__}: {error}")
            )
        finally:
            transport.close()

    threads = [threading.Thread(target=body, args=(t,), name=f"rank {t.rank}", daemon=True) for t in group]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    stuck = [thread.name for thread in threads if thread.is_alive()]
    if errors:
        raise errors[0]
    if stuck:
        raise TimeoutError(f"{', '.join(stuck)} did not return within {timeout} s")
    return [results[rank] for rank in range(size)]
