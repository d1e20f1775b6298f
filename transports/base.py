"""The interface of a message transport, and the matching of messages with receives that all of them share.

A transport moves bytes between ranks and knows nothing of dtypes or algorithms. Its unit is the message: so many bytes from
one rank to another on a *channel*, under a *label*. Messages between two ranks on one channel arrive in the order in which
they were sent; channels are independent of each other. The label (24 opaque bytes) says what the sender believes this
message to be; the receiver states what it expects, and the two must be equal. That is how two ranks that called different
things find out before wrong data is seen.

Sends and receives are posted and return at once with a `Request`; only `progress` moves bytes and may block. Everything is
driven by the caller's thread: a transport starts no thread of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

from transports.errors import Failure, JobFailed, LabelMismatch

LABEL_BYTES = 24
NO_LABEL = bytes(LABEL_BYTES)
LONGEST_WAIT = 3600.0
"""Seconds that one look for messages may take: what the operating system waits has a limit, some 24 days, and is no float."""


@dataclass(slots=True)
class Ledger:
    """Payload bytes by peer, added up by the transport at the moment they cross it."""

    sent: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    received: dict[int, int] = field(default_factory=lambda: defaultdict(int))


@dataclass(slots=True, eq=False)
class Request:
    """One posted send or receive; its buffer belongs to the transport until `done`."""

    peer: int
    channel: int
    label: bytes
    data: memoryview
    ledger: Ledger
    done: bool = False


@dataclass(slots=True, eq=False)
class Arrival:
    """A message on its way in: `data` is where its bytes go, the posted buffer itself when there is one."""

    peer: int
    channel: int
    label: bytes
    data: memoryview
    request: Request | None
    complete: bool = False


class Mailbox:
    """Pairs arriving messages with posted receives, first in first out per (peer, channel).

    A message that nobody has asked for yet is kept in memory of its own until its receive is posted. Labels are compared
    when message and receive meet, and also on arrival for every channel declared by `expect`, so that a mismatch shows even
    where the receive that would have met it is never posted.
    """

    def __init__(self) -> None:
        self._posted: dict[tuple[int, int], deque[Request]] = {}
        self._arrived: dict[tuple[int, int], deque[Arrival]] = {}
        self._expected: dict[int, bytes] = {}

    def expect(self, channel: int, label: bytes) -> None:
        """Every message on `channel` must carry `label` from now on; raises LabelMismatch if one already differs."""
        self._expected[channel] = label
        for (_, waiting_channel), arrivals in self._arrived.items():
            if waiting_channel == channel:
                for arrival in arrivals:
                    _compare(arrival.peer, channel, label, arrival.label)

    def forget(self, channel: int) -> None:
        """The channel is finished: its label is no longer compared on arrival."""
        self._expected.pop(channel, None)

    def post(self, request: Request) -> None:
        """Register a receive; it is done at once if its message has wholly arrived. Raises LabelMismatch."""
        key = (request.peer, request.channel)
        arrivals = self._arrived.get(key)
        if not arrivals:
            self._posted.setdefault(key, deque()).append(request)
            return
        arrival = arrivals.popleft()
        if not arrivals:
            del self._arrived[key]
        _compare_with_request(request, arrival.label, len(arrival.data))
        if arrival.complete:
            request.data[:] = arrival.data
            request.done = True
        else:
            arrival.request = request

    def arriving(self, peer: int, channel: int, label: bytes, size: int) -> Arrival:
        """A message of `size` bytes begins to arrive: returns where its bytes go. Raises LabelMismatch."""
        expected = self._expected.get(channel)
        if expected is not None:
            _compare(peer, channel, expected, label)
        key = (peer, channel)
        posted = self._posted.get(key)
        if posted:
            request = posted.popleft()
            if not posted:
                del self._posted[key]
            _compare_with_request(request, label, size)
            return Arrival(peer, channel, label, request.data, request)
        arrival = Arrival(peer, channel, label, memoryview(bytearray(size)), None)
        self._arrived.setdefault(key, deque()).append(arrival)
        return arrival

    def finish(self, arrival: Arrival) -> None:
        """All bytes of the message are in `arrival.data`: completes its receive, if that has been posted."""
        arrival.complete = True
        request = arrival.request
        if request is not None:
            if request.data is not arrival.data:
                request.data[:] = arrival.data
            request.done = True

    def waiting_for(self) -> set[int]:
        """The peers from which a receive is posted whose message has not begun to arrive."""
        return {peer for peer, _ in self._posted}


def _compare(peer: int, channel: int, ours: bytes, theirs: bytes) -> None:
    if ours != theirs:
        raise LabelMismatch(peer, channel, ours, theirs)


def _compare_with_request(request: Request, label: bytes, size: int) -> None:
    _compare(request.peer, request.channel, request.label, label)
    if len(request.data) != size:
        raise LabelMismatch(request.peer, request.channel, request.label, label, (len(request.data), size))


class Transport(ABC):
    """Messages between the `size` ranks of a job, seen from rank `rank`.

    Guarantees, checked by `transports.conformance`: messages of one sender, receiver and channel keep their order; labels
    and lengths are compared; a posted buffer is touched by nobody else until its request is done; after `abort` on any rank,
    and after the loss of any rank that had not said goodbye, every further call raises `JobFailed` with the first cause.
    A transport belongs to one thread at a time.
    """

    name: ClassVar[str]

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.mailbox = Mailbox()
        self._lock: AbstractContextManager[object] = nullcontext()
        # Guards the mailbox where other threads fill it; a transport driven by its own thread alone needs none.
        self.failure: Failure | None = None
        self._others_told = False
        self.closed = False
        self.overhead_sent = 0
        """Bytes of headers and control messages sent, beside the payload that the ledgers count."""

    @abstractmethod
    def _post_send(self, request: Request) -> None:
        """Take the message over; may complete the request at once."""

    @abstractmethod
    def _progress(self, timeout: float) -> bool: ...

    @abstractmethod
    def _send_failure(self, failure: Failure) -> None:
        """Tell every reachable peer, without blocking for long."""

    @abstractmethod
    def _close(self) -> None: ...

    def send(self, peer: int, channel: int, label: bytes, data: memoryview, ledger: Ledger) -> Request:
        """Post a message of `data` (contiguous bytes, unchanged until done) to `peer`; `ledger` counts it as it leaves."""
        self._check_usable(peer)
        request = Request(peer, channel, label, data, ledger)
        self._post_send(request)
        return request

    def recv(self, peer: int, channel: int, label: bytes, data: memoryview, ledger: Ledger) -> Request:
        """Post a receive of exactly `len(data)` bytes from `peer` into `data`; `ledger` counts them when they are in.

        Raises LabelMismatch if the message that arrives carries another label or length (now, or later from `progress`).
        """
        self._check_usable(peer)
        request = Request(peer, channel, label, data, ledger)
        with self._lock:
            self.mailbox.post(request)
            if request.done:
                ledger.received[peer] += len(data)
            else:
                self._posted_receive(peer)
        return request

    def expect(self, channel: int, label: bytes) -> None:
        """Declare the label of every message on `channel` until `forget`; raises LabelMismatch if one already differs."""
        with self._lock:
            self.mailbox.expect(channel, label)

    def forget(self, channel: int) -> None:
        """End what `expect` began."""
        with self._lock:
            self.mailbox.forget(channel)

    def _posted_receive(self, peer: int) -> None:
        """Called when a receive has to wait for `peer`; raises JobFailed where that peer can no longer send."""

    def progress(self, timeout: float) -> bool:
        """Move bytes; returns whether anything moved, after waiting at most `timeout` seconds (0: do not wait).

        Raises JobFailed when a peer is lost or has aborted, LabelMismatch when a message does not fit its receive.
        """
        self._check_usable(None)
        return self._progress(min(timeout, LONGEST_WAIT))

    def abort(self, failure: Failure) -> None:
        """End the job: this transport refuses further calls with `failure`, and every other rank learns of it."""
        if not self._others_told and not self.closed:
            self._others_told = True
            self._send_failure(self._fail(failure).failure)

    def close(self) -> None:
        """Say goodbye, flush what was sent, free every resource. Safe to repeat, also after a failure; never hangs."""
        if not self.closed:
            self.closed = True
            self._close()

    def leave_job(self) -> None:
        """Called last in a process that ends because of a failure, for transports whose peers would wait for it otherwise."""

    def _fail(self, failure: Failure) -> JobFailed:
        """Record the first cause and return the exception to raise."""
        if self.failure is None:
            self.failure = failure
        return JobFailed(self.failure)

    def _finish_arrival(self, arrival: Arrival) -> None:
        """Complete an arrival and count it for the receive that it belongs to, if there is one yet."""
        self.mailbox.finish(arrival)
        request = arrival.request
        if request is not None:
            request.ledger.received[request.peer] += len(request.data)

    def _check_usable(self, peer: int | None) -> None:
        if self.failure is not None:
            raise JobFailed(self.failure)
        if self.closed:
            raise ValueError(f"this {self.name} transport of rank {self.rank} is closed; call collectives.init() again")
        if peer is not None and (not 0 <= peer < self.size or peer == self.rank):
            raise ValueError(
                f"peer {peer} is not another rank of this job: expected 0 to {self.size - 1}, except {self.rank}"
            )
