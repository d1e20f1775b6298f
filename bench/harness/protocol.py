"""Messages between the driver and the ranks: one JSON object a line."""

from __future__ import annotations

import json
import socket
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

Message = dict[str, Any]
_BLOCK: Final = 1 << 16


def encode(message: Message) -> bytes:
    """The message as one line."""
    return json.dumps(message).encode() + b"\n"


class Decoder:
    """Turns the bytes of a stream, cut anywhere, back into messages."""

    def __init__(self) -> None:
        self._partial = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete with these bytes."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Channel:
    """One end of a connection; receiving blocks in the kernel, so that an idle rank takes no processor time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._decoder = connection, Decoder()
        self._messages: deque[Message] = deque()

    @classmethod
    def connect(cls, address: str) -> Channel:
        """To the Unix socket at `address`."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(address)
        return cls(connection)

    def send(self, message: Message) -> None:
        """Raises OSError when the other end is gone."""
        self._connection.sendall(encode(message))

    def receive(self, timeout: float | None = None) -> Message:
        """The next message; raises EOFError when the other end is gone, TimeoutError after `timeout` seconds."""
        self._connection.settimeout(timeout)
        while not self._messages:
            try:
                data = self._connection.recv(_BLOCK)
            except ConnectionError:
                data = b""
            if not data:
                raise EOFError
            self._messages.extend(self._decoder.feed(data))
        return self._messages.popleft()

    def close(self) -> None:
        """The other end then reads the end of the stream."""
        self._connection.close()

    def serve(self, steps: Mapping[str, Callable[..., Message]]) -> None:
        """Answer until the other end hangs up: a message names its step in `do`, and gives its arguments."""
        while True:
            try:
                self.send(answer(steps, self.receive()))
            except (EOFError, OSError):
                return


def answer(steps: Mapping[str, Callable[..., Message]], message: Message) -> Message:
    """Do what the message says; what goes wrong is in the answer."""
    try:
        return steps[message.pop("do")](**message)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
