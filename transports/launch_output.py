"""What the ranks print, on its way through the launcher: whole lines, each with its rank's prefix, written by one thread."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Final

_MOST: Final = 1 << 20
"""Bytes that wait for a slow reader before the ranks' pipes are left alone."""


class Writer:
    """Writes in a thread of its own, so that a reader that stalls delays neither signals nor deadlines.

    One thread serves stdout and stderr: what goes to both keeps its order and its lines whole where the two are one file.
    `room` is called, from that thread, when the writer has room again after it was `full`, and when writing fails.
    """

    def __init__(self, room: Callable[[], None]) -> None:
        self._room = room
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._stopped = threading.Event()
        self.error: OSError | None = None
        """Why nothing can be written any more."""

    def start(self) -> None:
        """Begin to write; to be called when nothing is forked any more."""
        threading.Thread(target=self._run, name="launcher's output", daemon=True).start()

    def put(self, sink: int, data: bytes) -> None:
        """Have `data` written to the descriptor `sink`; does not wait."""
        with self._changed:
            self._waiting.append((sink, data))
            self._bytes += len(data)
            self._changed.notify_all()

    @property
    def full(self) -> bool:
        """Whether so much waits for the reader that no more should be put."""
        return self._bytes > _MOST

    def flushed(self, seconds: float) -> bool:
        """Wait so long until everything is written; returns whether it is (or never will be)."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def stop(self) -> None:
        """Write nothing more, and call `room` no more."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped.is_set())
                if self._stopped.is_set():
                    return
                sink, data = self._waiting[0]
            try:
                view = memoryview(data if self.error is None else b"")
                while view:
                    view = view[os.write(sink, view) :]
            except OSError as error:
                self.error = error
            with self._changed:
                was_full = self.full
                self._waiting.popleft()
                self._bytes -= len(data)
                self._changed.notify_all()
                if not self._stopped.is_set() and (self.error is not None or (was_full and not self.full)):
                    self._room()


@dataclass(slots=True, eq=False)
class Stream:
    """One pipe of a rank."""

    source: IO[bytes]
    sink: int
    writer: Writer
    prefix: bytes
    suffix: bytes
    partial: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        """Pass on the lines that `data` completes."""
        self.partial += data
        end = self.partial.rfind(b"\n") + 1
        if end:
            lines = bytes(self.partial[:end])
            del self.partial[:end]
            self._pass_on(lines)

    def finish(self) -> None:
        """Pass on a last line that has no end."""
        if self.partial:
            self._pass_on(bytes(self.partial) + b"\n")
            self.partial.clear()

    def _pass_on(self, lines: bytes) -> None:
        text = b"".join(self.prefix + line + self.suffix + b"\n" for line in lines.split(b"\n")[:-1])
        self.writer.put(self.sink, text)
