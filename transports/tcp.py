"""Stream sockets, one between every two ranks."""

from __future__ import annotations

import os
import selectors
import socket
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from transports.base import NO_LABEL, Request, Transport
from transports.errors import Failure, JobFailed
from transports.life import watch
from transports.wire import Frame, FrameReader, Identity, encode_header

_READ_BUDGET: Final = 4 << 20
"""Bytes read from one peer before others have their turn."""
_ABORT_SECONDS: Final = 0.5
_CLOSE_SECONDS: Final = 2.0
_DRAIN_SECONDS: Final = 0.2
_SILENCE_SECONDS: Final = 0.5
"""How long a connection whose process has ended may bring nothing before it counts as lost."""


class _Outgoing:
    """A frame on its way out; `request` is the send that it completes."""

    __slots__ = ("request", "views")

    def __init__(self, header: bytes, data: memoryview, request: Request | None) -> None:
        self.views = [memoryview(header), data]
        self.request = request


class _Link:
    """The connection to one peer."""

    def __init__(self, peer: Identity, connection: socket.socket, reader: FrameReader) -> None:
        self.peer, self.connection, self.reader = peer, connection, reader
        self.outgoing: deque[_Outgoing] = deque()
        self.left = False
        self.life: int | None = None
        """A descriptor that becomes readable when the peer's process ends; None: cannot be seen, or is seen no more."""
        self.silent_since: float | None = None
        """Once the peer's process has ended: when its last bytes were read."""
        self.events = selectors.EVENT_READ


@dataclass(frozen=True, slots=True)
class _Life:
    """What the selector knows a link's `life` by."""

    link: _Link


class TcpTransport(Transport):
    """A full mesh of non-blocking stream sockets, driven by the caller's thread."""

    name = "tcp"

    def __init__(self, rank: int, size: int, connections: Mapping[int, tuple[socket.socket, Identity]]) -> None:
        super().__init__(rank, size)
        self._selector = selectors.DefaultSelector()
        self._links: dict[int, _Link] = {}
        self._anyone_left = False
        self._cause_sent = False
        self._ended: list[_Link] = []
        for peer, (connection, identity) in sorted(connections.items()):
            connection.setblocking(False)
            if connection.family != socket.AF_UNIX:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = FrameReader(
                lambda channel, label, length, peer=peer: self.mailbox.arriving(peer, channel, label, length),  # type: ignore[misc]
                self._finish_arrival,
                lambda kind, payload, peer=peer: self._control(peer, kind, payload),  # type: ignore[misc]
            )
            self._links[peer] = link = _Link(identity, connection, reader)
            self._selector.register(connection, selectors.EVENT_READ, link)
            link.life = watch(identity.pid, identity.birth)
            if link.life is not None:
                self._selector.register(link.life, selectors.EVENT_READ, _Life(link))
        _open.add(self)

    def _post_send(self, request: Request) -> None:
        link = self._links[request.peer]
        if link.left:
            raise self._fail(self._left(link))
        header = encode_header(Frame.DATA, request.channel, request.label, len(request.data))
        link.outgoing.append(_Outgoing(header, request.data, request))
        if len(link.outgoing) == 1:
            self._flush(link)

    def _posted_receive(self, peer: int) -> None:
        if self._links[peer].left:
            raise self._fail(self._left(self._links[peer]))

    def _progress(self, timeout: float) -> bool:
        moved = False
        if self._ended:
            timeout = min(timeout, _SILENCE_SECONDS)
        for key, ready in self._selector.select(max(0.0, timeout)):
            if isinstance(key.data, _Life):
                self._end(key.data.link)
                continue
            link: _Link = key.data
            if ready & selectors.EVENT_READ:
                moved = self._read(link) or moved
            if ready & selectors.EVENT_WRITE:
                moved = self._flush(link) or moved
        if self._ended:
            self._check_ended()
        if self._anyone_left:
            for peer in self.mailbox.waiting_for():
                if self._links[peer].left:
                    raise self._fail(self._left(self._links[peer]))
        return moved

    def _end(self, link: _Link) -> None:
        """The peer's process has ended. What it sent may still be on its way, and its goodbye too."""
        self._unwatch(link)
        link.silent_since = time.monotonic()
        self._ended.append(link)

    def _check_ended(self) -> None:
        """Raise JobFailed for a peer without process whose connection neither ends nor brings anything: a child holds it."""
        for link in tuple(self._ended):
            if self._read(link):
                link.silent_since = time.monotonic()
            if link.left:
                self._ended.remove(link)
            elif link.silent_since is not None and time.monotonic() - link.silent_since >= _SILENCE_SECONDS:
                raise self._fail(self._lost(link, None))

    def _unwatch(self, link: _Link) -> None:
        if link.life is not None:
            self._selector.unregister(link.life)
            os.close(link.life)
            link.life = None

    def _flush(self, link: _Link) -> bool:
        """Write what the socket takes; returns whether that was anything."""
        moved = False
        try:
            while link.outgoing:
                frame = link.outgoing[0]
                written = link.connection.sendmsg(frame.views)
                moved = True
                header = min(written, len(frame.views[0]))
                self.overhead_sent += header
                frame.views[0] = frame.views[0][header:]
                frame.views[1] = frame.views[1][written - header :]
                if frame.request is not None:
                    frame.request.ledger.sent[frame.request.peer] += written - header
                if frame.views[0] or frame.views[1]:
                    continue
                link.outgoing.popleft()
                if frame.request is not None:
                    frame.request.done = True
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self._read(link)  # what it said before it went may name the cause
            raise self._fail(self._lost(link, error)) from None
        self._watch(link)
        return moved

    def _watch(self, link: _Link) -> None:
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if link.outgoing else 0)
        if link.left:
            wanted &= ~selectors.EVENT_READ
        if wanted == link.events:
            return
        if link.events == 0:
            self._selector.register(link.connection, wanted, link)
        elif wanted == 0:
            self._selector.unregister(link.connection)
        else:
            self._selector.modify(link.connection, wanted, link)
        link.events = wanted

    def _read(self, link: _Link) -> bool:
        """Read what has come, a bounded amount; returns whether that was anything. Raises JobFailed, LabelMismatch."""
        budget = _READ_BUDGET
        while budget > 0 and not link.left:
            target = link.reader.target()
            try:
                count = link.connection.recv_into(target)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                raise self._fail(self._lost(link, error)) from None
            if count == 0:
                raise self._fail(self._lost(link, None))
            try:
                link.reader.received(count)
            except ValueError as error:
                raise self._fail(self._lost(link, error)) from None
            budget -= count
            if count < len(target):
                break
        self._watch(link)
        return budget < _READ_BUDGET

    def _control(self, peer: int, kind: Frame, payload: bytes) -> None:
        if kind is Frame.ABORT:
            self._others_told = True  # by whoever met it
            raise self._fail(Failure.decode(payload))
        self._links[peer].left = self._anyone_left = True
        self._unwatch(self._links[peer])

    def has_left(self, peer: int) -> bool:
        """Whether `peer` has said goodbye."""
        return peer != self.rank and self._links[peer].left

    def lose(self, peer: int) -> JobFailed:
        """End the job because this rank counts on `peer`, which has left; returns the exception to raise."""
        return self._fail(self._left(self._links[peer]))

    def _lost(self, link: _Link, error: Exception | None) -> Failure:
        detail = f" ({error})" if error else ""
        text = f"{link.peer} closed its connection without goodbye{detail}: its process ended or was killed; see its output"
        return Failure("PeerLost", link.peer.rank, text)

    def _left(self, link: _Link) -> Failure:
        text = f"{link.peer} left normally (it closed its communicator) while rank {self.rank} still counts on it"
        return Failure("PeerLost", link.peer.rank, text)

    def _send_failure(self, failure: Failure) -> None:
        self._cause_sent = True
        payload = failure.encode()
        header = encode_header(Frame.ABORT, 0, NO_LABEL, len(payload))
        for link in self._links.values():
            link.outgoing.append(_Outgoing(header, memoryview(payload), None))
        self._flush_all(_ABORT_SECONDS)

    def _flush_all(self, seconds: float) -> None:
        """Write everything that is queued, as far as peers take it within `seconds`, whatever has failed."""
        deadline = time.monotonic() + seconds
        pending = [link for link in self._links.values() if link.outgoing and not link.left]
        while pending and time.monotonic() < deadline:
            for link in pending:
                try:
                    while link.outgoing:
                        frame = link.outgoing[0]
                        written = link.connection.sendmsg(frame.views)
                        header = min(written, len(frame.views[0]))
                        frame.views = [frame.views[0][header:], frame.views[1][written - header :]]
                        if frame.request is not None:
                            frame.request.ledger.sent[frame.request.peer] += written - header
                        if not frame.views[0] and not frame.views[1]:
                            link.outgoing.popleft()
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError:
                    link.outgoing.clear()
            pending = [link for link in pending if link.outgoing]
            if pending:
                with selectors.DefaultSelector() as writable:
                    for link in pending:
                        writable.register(link.connection, selectors.EVENT_WRITE)
                    writable.select(max(0.0, deadline - time.monotonic()))

    def _close(self) -> None:
        if self.failure is None:
            goodbye = encode_header(Frame.BYE, 0, NO_LABEL, 0)
            for link in self._links.values():
                link.outgoing.append(_Outgoing(goodbye, memoryview(b""), None))
            self._flush_all(_CLOSE_SECONDS)
        elif not self._cause_sent:
            # Peers may see this connection end before the cause reaches them from the rank that met it.
            self._send_failure(self.failure)
        for link in self._links.values():
            _shut(link.connection)
        if self.failure is None:
            self._drain(self._links, _DRAIN_SECONDS)
        else:
            # The rank that failed ends before those that learnt of it: a launcher then sees the cause first.
            self._drain([self.failure.origin] if self.failure.origin in self._links else [], _CLOSE_SECONDS)
        self._release()

    def _drain(self, peers: Iterable[int], seconds: float) -> None:
        """Read for a moment what peers still send, until they close: unread data would destroy what is on its way out."""
        scratch = bytearray(1 << 16)
        deadline = time.monotonic() + seconds
        waiting = {self._links[peer].connection for peer in peers if not self._links[peer].left}
        waiting -= {link.connection for link in self._ended}
        with selectors.DefaultSelector() as readable:
            for connection in waiting:
                readable.register(connection, selectors.EVENT_READ, connection)
            while readable.get_map() and time.monotonic() < deadline:
                for key, _ in readable.select(max(0.0, deadline - time.monotonic())):
                    connection = key.data
                    try:
                        ended = connection.recv_into(scratch) == 0
                    except (BlockingIOError, InterruptedError):
                        continue
                    except OSError:
                        ended = True
                    if ended:
                        readable.unregister(connection)

    def _release(self) -> None:
        self._selector.close()
        for link in self._links.values():
            link.connection.close()
            if link.life is not None:
                os.close(link.life)
                link.life = None
        _open.discard(self)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass


_open: Final[weakref.WeakSet[TcpTransport]] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child is not a rank: it must not hold the connections open, nor speak on them."""
    for transport in list(_open):
        transport.closed = True
        transport._release()


os.register_at_fork(after_in_child=_forget_in_child)
