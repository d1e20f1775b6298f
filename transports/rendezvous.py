"""How the ranks of a job find each other, and end with one authenticated connection between every two of them.

Rank 0 listens at an address that all know. Every other rank listens at a port of its own, joins rank 0, and gets from it the
table of all addresses once everybody is there; then each rank connects to all lower ones. Every connection begins with the
handshake of `wire`. A job on one host without an address meets at an abstract Unix socket, open to its own user only, and
rank 0 then makes up the secret for the connections among the others. Without COLLECTIVES_TOKEN and with an address of your
own the secret is empty: whoever reaches the port and knows the job's name can join.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from transports.environment import World
from transports.errors import AuthenticationError, RendezvousError
from transports.life import birth_of
from transports.wire import Handshake, Identity, Message, MessageReader, State, encode_message

Connections = dict[int, tuple[socket.socket, Identity]]

_RETRY: Final = "not yet: "
"""Begins the refusal of a rank that comes to a rendezvous which is not the one it means."""
_RETRY_SECONDS: Final = 0.05
_LARGEST_TABLE: Final = 1 << 26
_LAST_WORD_SECONDS: Final = 10.0
"""After its own deadline a rank still waits so long for rank 0, which knows who is missing."""
_generations: Final = itertools.count()


def meet(world: World, timeout: float) -> Connections:
    """Connect this rank with all others; returns the connection to each, and who it is.

    Raises RendezvousError, naming the ranks that have not come within `timeout` seconds; AuthenticationError.
    """
    deadline = time.monotonic() + timeout
    generation = next(_generations)
    connections: Connections = {}
    try:
        if world.rank == 0:
            _lead(world, generation, deadline, timeout, connections)
        else:
            _follow(world, generation, deadline, timeout, connections)
    except BaseException:
        for connection, _ in connections.values():
            connection.close()
        raise
    return connections


def _identity(world: World, generation: int, port: int) -> Identity:
    process = os.getpid()
    return Identity(
        world.job, world.rank, world.size, generation, socket.gethostname(), port, process, birth_of(process)
    )


def _lead(world: World, generation: int, deadline: float, timeout: float, connections: Connections) -> None:
    with _listen(world) as listener:
        identity = _identity(world, generation, 0)
        others = range(1, world.size)
        addresses = _accept(listener, identity, world.token, others, deadline, timeout, connections)
    # Made up only for the Unix socket, which nobody else can read; a secret that the ranks have never travels.
    token = secrets.token_bytes(32) if world.rendezvous is None else b""
    table = {str(peer): (addresses[peer], identity.port) for peer, (_, identity) in connections.items()}
    body = encode_message(Message.TABLE, json.dumps({"addresses": table, "token": token.hex()}).encode())
    for connection, _ in connections.values():
        connection.settimeout(max(0.1, deadline - time.monotonic()))
        connection.sendall(body)


def _follow(world: World, generation: int, deadline: float, timeout: float, connections: Connections) -> None:
    family = socket.AF_INET6 if world.rendezvous is not None and ":" in world.rendezvous[0] else socket.AF_INET
    everywhere = "::" if family == socket.AF_INET6 else "0.0.0.0"
    loopback = world.rendezvous is None or world.rendezvous[0] in ("127.0.0.1", "localhost", "::1")
    host = ("::1" if family == socket.AF_INET6 else "127.0.0.1") if loopback else everywhere
    with socket.create_server((host, 0), family=family, backlog=max(128, world.size)) as listener:
        identity = _identity(world, generation, listener.getsockname()[1])
        connection, leader = _join(world.rendezvous, world, identity, world.token, deadline, timeout)
        connections[0] = (connection, leader)
        kind, body = read_message(
            connection, _LARGEST_TABLE, deadline + _LAST_WORD_SECONDS, "rank 0's table of addresses"
        )
        if kind is not Message.TABLE:
            raise RendezvousError(body.decode(errors="replace"))
        table = json.loads(body)
        token = bytes.fromhex(table["token"]) or world.token
        for peer in range(1, world.rank):
            address, port = table["addresses"][str(peer)]
            connections[peer] = _join((address, port), world, identity, token, deadline, timeout)
        higher = range(world.rank + 1, world.size)
        _accept(listener, identity, token, higher, deadline, timeout, connections)


def _listen(world: World) -> socket.socket:
    """Rank 0's listening socket."""
    if world.rendezvous_fd is not None:
        try:
            return socket.socket(fileno=os.dup(world.rendezvous_fd))
        except OSError:
            pass  # a descendant of rank 0 that did not inherit the descriptor: it tries the address
    if world.rendezvous is None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        address: str | tuple[str, int] = _unix_address(world)
    else:
        family = socket.AF_INET6 if ":" in world.rendezvous[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = world.rendezvous
    try:
        listener.bind(address)
        listener.listen(max(128, world.size))
    except OSError as error:
        listener.close()
        shown = "{}:{}".format(*world.rendezvous) if world.rendezvous else "the job's Unix socket"
        if error.errno == errno.EADDRINUSE:
            raise RendezvousError(
                f"rank 0 cannot listen at {shown}: the address is in use, by another job or program; "
                "choose another port in COLLECTIVES_RENDEZVOUS (or MASTER_PORT)"
            ) from None
        raise RendezvousError(f"rank 0 cannot listen at {shown}: {error.strerror}") from None
    return listener


def _unix_address(world: World) -> str:
    name = hashlib.sha256(world.job.encode(errors="surrogateescape")).hexdigest()[
        :32
    ]  # an address has at most 108 bytes
    return f"\0collectives-{os.getuid()}-{name}"


def _join(
    address: tuple[str, int] | None, world: World, identity: Identity, token: bytes, deadline: float, timeout: float
) -> tuple[socket.socket, Identity]:
    """Connect and shake hands, again and again until the other side is there."""
    shown = "{}:{}".format(*address) if address else "the job's Unix socket"
    while True:
        reason = "no answer"
        connection: socket.socket | None = None
        try:
            if address is None:
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(max(0.01, deadline - time.monotonic()))
                connection.connect(_unix_address(world))
                check_user(connection)
            else:
                connection = socket.create_connection(address, max(0.01, deadline - time.monotonic()))
            return connection, _shake(connection, Handshake(identity, token), deadline)
        except RendezvousError as error:
            if connection is not None:
                connection.close()
            if not str(error).startswith(_RETRY):
                raise RendezvousError(f"rank {world.rank} was refused at {shown}: {error}") from None
            reason = str(error)
        except AuthenticationError:
            assert connection is not None
            connection.close()
            raise
        except OSError as error:
            if connection is not None:
                connection.close()
            reason = str(error)
        if time.monotonic() + _RETRY_SECONDS > deadline:
            raise RendezvousError(
                f"rank {world.rank} found nobody at {shown} within {timeout:g} s ({reason}); is the rank that listens there "
                "running, and the address reachable from here?"
            )
        time.sleep(_RETRY_SECONDS)


def _shake(connection: socket.socket, handshake: Handshake, deadline: float) -> Identity:
    connection.sendall(handshake.outgoing)
    kind, body = read_message(connection, 4096, deadline, "the answer to the handshake")
    handshake.receive(kind, body)
    connection.sendall(handshake.outgoing)
    assert handshake.peer is not None
    return handshake.peer


def read_message(connection: socket.socket, largest: int, deadline: float, what: str) -> tuple[Message, bytes]:
    """Read exactly one message from a connection; raises RendezvousError naming `what` when it does not come in time."""
    reader = MessageReader(largest)
    while True:
        remaining = deadline - time.monotonic()
        connection.settimeout(max(0.01, remaining))
        try:
            data = connection.recv(min(reader.missing(), 1 << 16))
        except TimeoutError:
            raise RendezvousError(f"{what} did not come in time; some ranks have not joined") from None
        if not data:
            raise ConnectionResetError(f"the connection ended before {what}")
        message = reader.feed(data)
        if message is not None:
            return message


@dataclass(slots=True, eq=False)
class _Joiner:
    """A connection that has not proved yet who it is."""

    connection: socket.socket
    address: str
    handshake: Handshake
    reader: MessageReader


def _accept(
    listener: socket.socket,
    identity: Identity,
    token: bytes,
    expected: Collection[int],
    deadline: float,
    timeout: float,
    connections: Connections,
) -> dict[int, str]:
    """Take in the expected ranks; strangers, and ranks that do not belong here, are turned away. Returns their addresses."""
    addresses: dict[int, str] = {}
    refusals: list[str] = []

    def accept(peer: Identity) -> str | None:
        if peer.generation != identity.generation:
            return (
                f"{_RETRY}{identity} is at its init number {identity.generation + 1}, {peer} at {peer.generation + 1}"
            )
        if peer.rank in connections:
            return f"there is a {connections[peer.rank][1]} already, and {peer} claims the same rank"
        if peer.rank not in expected:
            return f"{peer} is not expected by rank {identity.rank}"
        return None

    listener.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        try:
            while len(addresses) < len(expected):
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    _give_up(expected, connections, refusals, identity, timeout)
                for key, _ in selector.select(remaining):
                    if key.data is None:
                        joiner = _take_in(listener, identity, token, accept)
                        if joiner is not None:
                            selector.register(joiner.connection, selectors.EVENT_READ, joiner)
                    elif _serve(key.data, refusals):
                        joiner = key.data
                        selector.unregister(joiner.connection)
                        peer = joiner.handshake.peer
                        if joiner.handshake.state is State.DONE and peer is not None and peer.rank not in connections:
                            connections[peer.rank] = (joiner.connection, peer)
                            addresses[peer.rank] = joiner.address
                        else:
                            joiner.connection.close()
        finally:
            for key in list(selector.get_map().values()):
                if isinstance(key.data, _Joiner):
                    key.data.connection.close()
    return addresses


def _take_in(listener: socket.socket, identity: Identity, token: bytes, accept) -> _Joiner | None:  # type: ignore[no-untyped-def]
    try:
        connection, address = listener.accept()
    except OSError:
        return None
    connection.setblocking(False)
    try:
        if connection.family == socket.AF_UNIX:
            check_user(connection)
    except AuthenticationError:
        connection.close()
        return None
    host = address[0] if connection.family != socket.AF_UNIX else "127.0.0.1"
    return _Joiner(connection, host, Handshake(identity, token, accept), MessageReader())


def _serve(joiner: _Joiner, refusals: list[str]) -> bool:
    """Go on with a handshake; returns whether it is over, well or not."""
    handshake = joiner.handshake
    try:
        data = joiner.connection.recv(joiner.reader.missing())
        if not data:
            return True
        message = joiner.reader.feed(data)
        if message is None:
            return False
        handshake.receive(*message)
        if handshake.state is not State.DONE:
            joiner.connection.sendall(handshake.outgoing)
    except (RendezvousError, AuthenticationError) as error:
        if handshake.outgoing and not str(error).startswith(_RETRY):
            refusals.append(f"{error} (from {joiner.address})")
        try:
            joiner.connection.sendall(handshake.outgoing)
        except OSError:
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    return handshake.state is State.DONE


def _give_up(
    expected: Collection[int], connections: Connections, refusals: list[str], identity: Identity, timeout: float
) -> None:
    missing = ", ".join(str(rank) for rank in expected if rank not in connections)
    text = f"after {timeout:g} s rank {identity.rank} still misses rank {missing} of {identity.size}; were all ranks started?"
    if refusals:
        text += f" Turned away meanwhile: {'; '.join(refusals[:3])}"
    for connection, _ in connections.values():
        try:
            connection.sendall(encode_message(Message.REFUSE, text.encode()[:1000]))
        except OSError:
            pass
    raise RendezvousError(text)


def check_user(connection: socket.socket) -> None:
    """The other side of a Unix socket must be a process of the same user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    if user != os.getuid():
        raise AuthenticationError(
            f"the process at the job's Unix socket belongs to user {user}, not to user {os.getuid()}"
        )
