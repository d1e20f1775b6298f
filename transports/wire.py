"""What goes over a connection, as state machines that do no input or output.

A connection begins with a handshake of three messages, in which both sides prove that they know the job's secret:

    joiner  HELLO (who I am, nonce)      ->
            <-  WELCOME (who I am, nonce, HMAC over both)   or   REFUSE (why)
    joiner  PROOF (HMAC over both)       ->

Then frames follow, in both directions: a header of 48 bytes, then `length` bytes of payload.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any, Final

from transports.base import LABEL_BYTES, Arrival
from transports.errors import AuthenticationError, RendezvousError

PROTOCOL: Final = 1
_MAGIC: Final = b"CCR1"
_MESSAGE: Final = struct.Struct("<4sBI")
_LARGEST_HANDSHAKE: Final = 4096
"""Bytes of one message that a stranger can make us keep."""


class Message(IntEnum):
    """The messages before the frames; TABLE is the rendezvous's answer, after the handshake."""

    HELLO = 1
    WELCOME = 2
    PROOF = 3
    REFUSE = 4
    TABLE = 5


def encode_message(kind: Message, body: bytes) -> bytes:
    """One handshake message as bytes."""
    return _MESSAGE.pack(_MAGIC, kind, len(body)) + body


class MessageReader:
    """Cuts a byte stream into handshake messages."""

    def __init__(self, largest: int = _LARGEST_HANDSHAKE) -> None:
        self.largest = largest
        self._buffer = bytearray()

    def missing(self) -> int:
        """How many bytes may be read without taking any that follow this message."""
        if len(self._buffer) < _MESSAGE.size:
            return _MESSAGE.size - len(self._buffer)
        return _MESSAGE.size + int(_MESSAGE.unpack_from(self._buffer)[2]) - len(self._buffer)

    def feed(self, data: bytes) -> tuple[Message, bytes] | None:
        """Take at most `missing()` bytes; returns the message when it is whole. Raises RendezvousError for anything else."""
        self._buffer += data
        if len(self._buffer) < _MESSAGE.size:
            if not _MAGIC.startswith(self._buffer[:4]):
                raise RendezvousError("the other side does not speak this protocol")
            return None
        magic, kind, length = _MESSAGE.unpack_from(self._buffer)
        if magic != _MAGIC or kind not in Message.__members__.values() or length > self.largest:
            raise RendezvousError("the other side does not speak this protocol")
        if len(self._buffer) < _MESSAGE.size + length:
            return None
        body = bytes(self._buffer[_MESSAGE.size :])
        self._buffer.clear()
        return Message(kind), body


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a process says it is in the handshake."""

    job: str
    rank: int
    size: int
    generation: int
    """How many times this process has joined the job before."""
    host: str
    port: int
    """Where it listens for other ranks; 0: nowhere."""
    pid: int
    birth: str = ""
    """What, with the pid, is equal only for one and the same process, as `life.birth_of` says it; empty: unknown."""
    protocol: int = PROTOCOL

    def encode(self) -> bytes:
        """As JSON with a fresh nonce."""
        fields = {name: getattr(self, name) for name in Identity.__dataclass_fields__}
        return json.dumps({**fields, "nonce": secrets.token_hex(16)}).encode()

    @classmethod
    def decode(cls, body: bytes) -> Identity:
        """The inverse; raises RendezvousError for a body that is not an identity."""
        try:
            fields: dict[str, Any] = json.loads(body)
            texts = {name: str(fields[name]) for name in ("job", "host", "birth")}
            numbers = {name: int(fields[name]) for name in ("rank", "size", "generation", "port", "pid", "protocol")}
            return cls(**texts, **numbers)  # type: ignore[arg-type]
        except (ValueError, KeyError, TypeError):
            raise RendezvousError("the other side sent no identity") from None

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"


class State(Enum):
    """Of a handshake."""

    AWAIT_HELLO = "await HELLO"
    AWAIT_WELCOME = "await WELCOME"
    AWAIT_PROOF = "await PROOF"
    DONE = "done"
    REFUSED = "refused"


_EXPECTED: Final = {
    State.AWAIT_HELLO: Message.HELLO,
    State.AWAIT_WELCOME: Message.WELCOME,
    State.AWAIT_PROOF: Message.PROOF,
}


class Handshake:
    """One side of the handshake; `outgoing` is what to send next.

    `accept(identity)` is asked by the host for each joiner and returns a reason to refuse it, or None.
    """

    def __init__(self, own: Identity, token: bytes, accept: Callable[[Identity], str | None] | None = None) -> None:
        self._token, self._accept = token, accept
        self._own = own.encode()
        self._theirs = b""
        self._identity = own
        self.peer: Identity | None = None
        self.state = State.AWAIT_HELLO if accept else State.AWAIT_WELCOME
        self.outgoing = b"" if accept else encode_message(Message.HELLO, self._own)

    def receive(self, kind: Message, body: bytes) -> None:
        """Take the next message. Raises AuthenticationError, or RendezvousError with the other side's reason."""
        if kind is Message.REFUSE:
            self.state = State.REFUSED
            raise RendezvousError(body.decode(errors="replace"))
        if _EXPECTED.get(self.state) is not kind:
            self._refuse(f"unexpected {kind.name} while in state {self.state.value}")
        if kind is Message.HELLO:
            self._greet(body)
        elif kind is Message.WELCOME:
            proof, self._theirs = body[:32], body[32:]
            self.peer = Identity.decode(self._theirs)
            if not hmac.compare_digest(proof, self._proof(b"host", self._own, self._theirs)):
                self.state = State.REFUSED
                raise AuthenticationError(
                    f"{self.peer} does not know this job's secret; set the same COLLECTIVES_TOKEN on all ranks"
                )
            self.outgoing = encode_message(Message.PROOF, self._proof(b"join", self._own, self._theirs))
            self.state = State.DONE
        else:
            if not hmac.compare_digest(body, self._proof(b"join", self._theirs, self._own)):
                self._refuse("the secrets differ; set the same COLLECTIVES_TOKEN on all ranks", AuthenticationError)
            self.state = State.DONE

    def _greet(self, body: bytes) -> None:
        peer = Identity.decode(body)
        own = self._identity
        for name, what in (("protocol", "version of the protocol"), ("job", "job"), ("size", "number of ranks")):
            if getattr(peer, name) != getattr(own, name):
                self._refuse(f"{peer} belongs to another {what}: {getattr(peer, name)}, expected {getattr(own, name)}")
        reason = self._accept(peer) if self._accept else None
        if reason is not None:
            self._refuse(reason)
        self.peer, self._theirs = peer, body
        self.outgoing = encode_message(Message.WELCOME, self._proof(b"host", body, self._own) + self._own)
        self.state = State.AWAIT_PROOF

    def _proof(self, role: bytes, joiner: bytes, host: bytes) -> bytes:
        return hmac.digest(
            self._token, hashlib.sha256(role + joiner).digest() + hashlib.sha256(host).digest(), "sha256"
        )

    def _refuse(self, reason: str, kind: type[RendezvousError | AuthenticationError] = RendezvousError) -> None:
        self.state = State.REFUSED
        self.outgoing = encode_message(Message.REFUSE, reason.encode()[:1000])
        raise kind(reason)


class Frame(IntEnum):
    """What a frame is."""

    DATA = 1
    ABORT = 2
    BYE = 3


_HEADER: Final = struct.Struct(f"<B7xQ{LABEL_BYTES}sQ")
HEADER_BYTES: Final = _HEADER.size
_LARGEST_CONTROL: Final = 1 << 16
_BUFFER: Final = 1 << 16


def encode_header(kind: Frame, channel: int, label: bytes, length: int) -> bytes:
    """The header of a frame."""
    return _HEADER.pack(kind, channel, label, length)


def decode_header(data: memoryview) -> tuple[Frame, int, bytes, int]:
    """Kind, channel, label and length of the frame whose header begins `data`; raises ValueError if it is none."""
    kind, channel, label, length = _HEADER.unpack_from(data)
    return Frame(kind), channel, label, length


class FrameReader:
    """Cuts a byte stream into frames, and lets large payloads go straight to where they belong.

    `target()` is where the next bytes are to be received, `received(n)` says how many came. `begin` is called for every DATA
    header and returns its arrival, `finish` when its bytes are in, `control` with every other frame's payload.
    """

    def __init__(
        self,
        begin: Callable[[int, bytes, int], Arrival],
        finish: Callable[[Arrival], None],
        control: Callable[[Frame, bytes], None],
    ) -> None:
        self._begin, self._finish, self._control = begin, finish, control
        self._buffer = memoryview(bytearray(_BUFFER))
        self._start = self._stop = 0
        self._arrival: Arrival | None = None
        self._kind = Frame.DATA
        self._payload = memoryview(b"")
        self._filled = 0
        self._in_payload = False

    def target(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._in_payload and len(self._payload) - self._filled >= _BUFFER // 4:
            return self._payload[self._filled :]
        if self._start:
            rest = self._stop - self._start
            self._buffer[:rest] = bytes(self._buffer[self._start : self._stop])
            self._start, self._stop = 0, rest
        return self._buffer[self._stop :]

    def received(self, count: int) -> None:
        """`count` bytes are in `target()`. Raises ValueError for a stream that is no sequence of frames."""
        if self._in_payload and len(self._payload) - self._filled >= _BUFFER // 4:
            self._filled += count
        else:
            self._stop += count
        while self._advance():
            pass

    def _advance(self) -> bool:
        available = self._stop - self._start
        if not self._in_payload:
            if available < HEADER_BYTES:
                return False
            kind, channel, label, length = _HEADER.unpack_from(self._buffer, self._start)
            if kind not in Frame.__members__.values() or (kind != Frame.DATA and length > _LARGEST_CONTROL):
                raise ValueError("the stream holds something that is no frame")
            self._start += HEADER_BYTES
            self._kind, self._filled, self._in_payload = Frame(kind), 0, True
            self._arrival = self._begin(channel, label, length) if kind == Frame.DATA else None
            self._payload = self._arrival.data if self._arrival else memoryview(bytearray(length))
            return True
        taken = min(available, len(self._payload) - self._filled)
        if taken:
            self._payload[self._filled : self._filled + taken] = self._buffer[self._start : self._start + taken]
            self._start += taken
            self._filled += taken
        if self._filled < len(self._payload):
            return False
        self._in_payload = False
        if self._arrival is not None:
            arrival, self._arrival = self._arrival, None
            self._finish(arrival)
        else:
            self._control(self._kind, bytes(self._payload))
        return True
