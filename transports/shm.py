"""Shared memory between the ranks of one host.

Bytes move by loads and stores in heaps that every rank has mapped; see `native/board.hpp` for what lies in them. Each rank's
heap is a memfd, handed round once by rank 0 over Unix sockets with an abstract name, on which both sides check the other's
user. The connections of the rendezvous stay: they carry what ends a job, goodbyes, aborts and the end of a process, and
serve whatever has no way over memory yet.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Mapping as Dictionary
from pathlib import Path
from typing import Any, Final

from transports.errors import Failure, RendezvousError, TransportUnavailable
from transports.heap import Mapping, SharedHeap, default_size
from transports.rendezvous import Connections, check_user, read_message
from transports.tcp import TcpTransport
from transports.wire import Message, encode_message

DOORBELL_BYTES: Final = 4096
"""What every heap begins with: the doorbell and the abort word of native/wait.hpp."""
_ABORTED_OFFSET: Final = 128
_LARGEST: Final = 1 << 20
_DESCRIPTORS_A_MESSAGE: Final = 250


class ShmTransport(TcpTransport):
    """Heaps of all ranks, mapped; `heaps[rank]` is the mapping of each, `heap` this rank's own."""

    name = "shm"

    def __init__(
        self,
        rank: int,
        size: int,
        connections: Connections,
        heap: SharedHeap,
        heaps: list[Mapping],
        cores: int,
        processes: list[int],
    ) -> None:
        super().__init__(rank, size, connections)
        self.heap, self.heaps = heap, heaps
        self.cores: Final = cores
        """Cores that the ranks may run on, all of them together."""
        self.processes: Final = processes
        """Process ids by which the ranks can read each other's memory; zeros where the system does not let them."""

    def _send_failure(self, failure: Failure) -> None:
        for mapping in self.heaps:
            struct.pack_into("<I", mapping.memory, _ABORTED_OFFSET, 1)
        super()._send_failure(failure)

    def _release(self) -> None:
        self.heap.close()
        super()._release()


def connect_shm(rank: int, size: int, connections: Connections, timeout: float) -> ShmTransport:
    """Hand the heaps round over the connections of the rendezvous.

    Raises TransportUnavailable on every rank, with the reason of the first that has one, where they cannot share memory; the
    connections are then as before.
    """
    deadline = time.monotonic() + timeout
    heap: SharedHeap | None = None
    reason = ""
    try:
        heap = SharedHeap(default_size())
        heap.allocate(DOORBELL_BYTES)
    except (TransportUnavailable, MemoryError) as error:
        reason = str(error)
    descriptors: list[int] = []
    try:
        probe = ctypes.create_string_buffer(secrets.token_hex(16).encode())
        mine = {
            "reason": reason,
            "host": _host(),
            "cores": sorted(os.sched_getaffinity(0)),
            "process": os.getpid(),
            "probe": [ctypes.addressof(probe), probe.value.decode()],
        }
        places = _all_gather(rank, connections, mine, deadline)
        _check_places(places)
        assert heap is not None
        descriptors = _hand_round(rank, size, connections, heap, deadline)
        try:
            heaps = [
                heap.mapping if peer == rank else Mapping(descriptors[peer], heap.mapping.size) for peer in range(size)
            ]
        except OSError as error:
            reason = f"rank {rank} cannot map the heaps of the others: {error.strerror}; see ulimit -v"
        reads = all(_can_read(place["process"], *place["probe"]) for place in places)
        verdicts = _all_gather(rank, connections, {"reason": reason, "host": "", "reads": reads}, deadline)
        _check_places(verdicts)
        cores = len({core for place in places for core in place["cores"]})
        reads = all(verdict["reads"] for verdict in verdicts)
        processes = [place["process"] if reads else 0 for place in places]
        transport = ShmTransport(rank, size, connections, heap, heaps, cores, processes)
        heap = None
        return transport
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        if heap is not None:
            heap.close()


def _host() -> str:
    """Equal for processes that can hand descriptors to each other: one kernel, one network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').readlink()}"
    except OSError:
        return socket.gethostname()


class _Piece(ctypes.Structure):
    """An iovec."""

    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _can_read(process: int, address: int, content: str) -> bool:
    """Whether process_vm_readv finds `content` at an address of another process: see ptrace_scope in ptrace(2)."""
    found = ctypes.create_string_buffer(len(content))
    local, remote = _Piece(ctypes.addressof(found), len(content)), _Piece(address, len(content))
    try:
        count = ctypes.CDLL(None).process_vm_readv(process, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    except AttributeError:  # not Linux
        return False
    return count == len(content) and found.raw == content.encode()


def _check_places(places: list[dict[str, Any]]) -> None:
    for rank, place in enumerate(places):
        if place["reason"]:
            raise TransportUnavailable(f"transport shm: rank {rank}: {place['reason']}")
        if place["host"] != places[0]["host"]:
            raise TransportUnavailable(
                f"transport shm: rank {rank} is not on the host of rank 0, or in another network namespace; use transport='tcp'"
            )


def _all_gather(rank: int, connections: Connections, mine: dict[str, Any], deadline: float) -> list[dict[str, Any]]:
    """What every rank says, in the order of the ranks, by way of rank 0."""
    if rank != 0:
        _tell(connections[0][0], mine, deadline)
        found: list[dict[str, Any]] = _hear(connections[0][0], 0, deadline)
        return found
    everything = [mine] + [_hear(connections[peer][0], peer, deadline) for peer in sorted(connections)]
    for connection, _ in connections.values():
        _tell(connection, everything, deadline)
    return everything


def _tell(connection: socket.socket, what: object, deadline: float) -> None:
    connection.settimeout(max(0.1, deadline - time.monotonic()))
    connection.sendall(encode_message(Message.TABLE, json.dumps(what).encode()))


def _hear(connection: socket.socket, peer: int, deadline: float) -> Any:
    try:
        _, body = read_message(connection, _LARGEST, deadline, f"what rank {peer} says of its shared memory")
    except OSError as error:
        raise RendezvousError(f"rank {peer} ended while shared memory was set up ({error})") from None
    return json.loads(body)


def _hand_round(rank: int, size: int, connections: Connections, heap: SharedHeap, deadline: float) -> list[int]:
    """Give this rank's memfd to rank 0 and get those of all ranks from it, in their order."""
    if rank != 0:
        ticket: Dictionary[str, str] = _hear(connections[0][0], 0, deadline)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            connection.connect(b"\0" + bytes.fromhex(ticket["name"]))
            check_user(connection)
            socket.send_fds(connection, [bytes.fromhex(ticket["secret"])], [heap.descriptor])
            return _receive_descriptors(connection, size)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")  # the kernel finds an unused abstract name
        listener.listen(size)
        secret_of = {peer: secrets.token_bytes(16) for peer in connections}
        name = listener.getsockname()[1:].hex()
        for peer, (connection, _) in connections.items():
            _tell(connection, {"name": name, "secret": secret_of[peer].hex()}, deadline)
        descriptors = {0: os.dup(heap.descriptor)}
        waiting: dict[int, socket.socket] = {}
        try:
            while len(waiting) < size - 1:
                listener.settimeout(max(0.1, deadline - time.monotonic()))
                connection, _ = listener.accept()
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                secret, found, _, _ = socket.recv_fds(connection, 16, 1)
                known = [peer for peer, its_secret in secret_of.items() if its_secret == secret and peer not in waiting]
                if not known or len(found) != 1:
                    connection.close()
                    continue
                check_user(connection)
                waiting[known[0]], descriptors[known[0]] = connection, found[0]
            in_order = [descriptors[peer] for peer in range(size)]
            for connection in waiting.values():
                for first in range(0, size, _DESCRIPTORS_A_MESSAGE):
                    socket.send_fds(connection, [b"d"], in_order[first : first + _DESCRIPTORS_A_MESSAGE])
            return in_order
        except TimeoutError:
            missing = ", ".join(str(peer) for peer in connections if peer not in waiting)
            raise RendezvousError(f"rank {missing} did not come for the shared memory in time") from None
        finally:
            for connection in waiting.values():
                connection.close()


def _receive_descriptors(connection: socket.socket, size: int) -> list[int]:
    descriptors: list[int] = []
    while len(descriptors) < size:
        data, found, _, _ = socket.recv_fds(connection, 1, _DESCRIPTORS_A_MESSAGE)
        descriptors += found
        if not data or not found:
            for descriptor in descriptors:
                os.close(descriptor)
            raise RendezvousError("rank 0 ended while shared memory was handed round")
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return descriptors
