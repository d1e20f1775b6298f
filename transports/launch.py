"""The launcher: starts the ranks of a job on this host, shows what they print, and ends all of them when one fails."""

from __future__ import annotations

import ctypes
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO, Any, Final

_FORWARDED: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_COLOURS: Final = (36, 33, 32, 35, 34, 31)
_BLOCK: Final = 1 << 16
_SETTLING_SECONDS: Final = 1.0
"""After the first failure, for the others to say what they met."""
OUTPUTS: Final = ("auto", "prefix", "colour", "rank0", "raw")


class LaunchError(Exception):
    """The job could not be started; the message is one line."""


@dataclass(slots=True, eq=False)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    ended_by_us: bool = False
    code: int | None = None


@dataclass(slots=True, eq=False)
class _Stream:
    """One pipe of a rank: whole lines are passed on, each with the rank's prefix."""

    source: IO[bytes]
    sink: int
    prefix: bytes
    suffix: bytes
    partial: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        self.partial += data
        end = self.partial.rfind(b"\n") + 1
        if end:
            lines = bytes(self.partial[:end])
            del self.partial[:end]
            self._write(lines)

    def finish(self) -> None:
        if self.partial:
            self._write(bytes(self.partial) + b"\n")
            self.partial.clear()

    def _write(self, lines: bytes) -> None:
        text = b"".join(self.prefix + line + self.suffix + b"\n" for line in lines.split(b"\n")[:-1])
        view = memoryview(text)
        while view:
            view = view[os.write(self.sink, view) :]


def launch(
    command: Sequence[str],
    ranks: int,
    *,
    output: str = "auto",
    environment: Mapping[str, str] | None = None,
    timeout: float | None = None,
    grace: float = 5.0,
    threads: int | None = None,
) -> int:
    """Run `ranks` processes of `command` as one job on this host; returns the exit code.

    The exit code is 0 when every rank returns 0, otherwise that of the rank that failed first (128 + the signal's number when
    a signal killed it), and the last line on stderr names it. 124: `timeout` (seconds) passed. 2: could not start. The other
    ranks then get SIGTERM and, `grace` seconds later, SIGKILL. Signals that arrive are forwarded to every rank.

    `output`: prefix (each line begins with its rank), colour, rank0 (rank 0 has our terminal, the others are prefixed), raw,
    or auto (colour on a terminal). `threads`: threads of numerical libraries per rank, by default cores ÷ ranks.
    """
    try:
        job = _Job(command, ranks, output, environment or {}, grace, threads)
    except LaunchError as error:
        print(f"collectives run: {error}", file=sys.stderr)
        return 2
    return job.run(timeout)


class _Job:
    def __init__(
        self,
        command: Sequence[str],
        ranks: int,
        output: str,
        environment: Mapping[str, str],
        grace: float,
        threads: int | None,
    ) -> None:
        if ranks < 1:
            raise LaunchError(f"-n is {ranks}; expected at least 1 rank")
        self.command, self.grace = list(command), grace
        self.selector = selectors.DefaultSelector()
        self.ranks: list[_Rank] = []
        self.failures: list[_Rank] = []
        self.settled: float | None = None
        self.deadline: float | None = None
        self.interrupts = 0
        if output == "auto":
            output = "colour" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "prefix"
        self.output = output
        variables = {**os.environ, **environment}
        for name in _THREAD_VARIABLES:
            if threads is not None or name not in variables:
                variables[name] = str(threads or max(1, (os.cpu_count() or 1) // ranks))
        # Ranks that end because another one failed say so here, each with four bytes.
        self.learnt, self.learnt_writer = os.pipe()
        os.set_blocking(self.learnt, False)
        variables["COLLECTIVES_LEARNT_FD"] = str(self.learnt_writer)
        with socket.create_server(("127.0.0.1", 0), backlog=max(128, ranks)) as listener:
            variables.update(
                PYTHONFAULTHANDLER="1",
                COLLECTIVES_SIZE=str(ranks),
                COLLECTIVES_LOCAL_SIZE=str(ranks),
                COLLECTIVES_RENDEZVOUS="{}:{}".format(*listener.getsockname()),
                COLLECTIVES_TOKEN=secrets.token_hex(32),
                COLLECTIVES_JOB=secrets.token_hex(8),
            )
            variables.pop("COLLECTIVES_RENDEZVOUS_FD", None)
            for number in range(ranks):
                try:
                    self._start(number, variables, listener)
                except OSError as error:
                    self._kill_all()
                    raise LaunchError(
                        f"rank {number} of {ranks} could not be started: {self.command[0]}: {error.strerror}"
                    ) from None

    def _start(self, number: int, variables: Mapping[str, str], listener: socket.socket) -> None:
        own = {**variables, "COLLECTIVES_RANK": str(number), "COLLECTIVES_LOCAL_RANK": str(number)}
        descriptors: tuple[int, ...] = (self.learnt_writer,)
        if number == 0:
            descriptors = (self.learnt_writer, listener.fileno())
            own["COLLECTIVES_RENDEZVOUS_FD"] = str(listener.fileno())
        inherits = self.output == "raw" or (self.output == "rank0" and number == 0)
        pipe = None if inherits else subprocess.PIPE
        process = subprocess.Popen(
            self.command,
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            pass_fds=descriptors,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )
        rank = _Rank(number, process)
        self.ranks.append(rank)
        for source, sink in ((process.stdout, 1), (process.stderr, 2)):
            if source is not None:
                os.set_blocking(source.fileno(), False)
                self.selector.register(source, selectors.EVENT_READ, _Stream(source, sink, *self._decoration(number)))
        if hasattr(os, "pidfd_open"):
            self.selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, rank)

    def _decoration(self, number: int) -> tuple[bytes, bytes]:
        text = f"[{number}] "
        if self.output != "colour":
            return text.encode(), b""
        return f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{text}\x1b[0m".encode(), b""

    def run(self, timeout: float | None) -> int:
        """Serve the ranks until all have ended."""
        expiry = None if timeout is None else time.monotonic() + timeout
        previous = {getattr(signal, name): signal.signal(getattr(signal, name), self._forward) for name in _FORWARDED}
        timed_out: list[int] = []
        try:
            while any(rank.code is None for rank in self.ranks):
                self._serve(0.2)
                now = time.monotonic()
                if expiry is not None and now > expiry and not timed_out:
                    timed_out = [rank.number for rank in self.ranks if rank.code is None]
                    self._signal_all(signal.SIGABRT)
                    self.deadline = now + min(self.grace, 2.0)
                if self.deadline is not None and now > self.deadline:
                    self._signal_all(signal.SIGKILL)
            self._drain()
        except BrokenPipeError:
            self._kill_all()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 128 + signal.SIGPIPE
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._kill_all()
            for key in list(self.selector.get_map().values()):
                if isinstance(key.data, _Rank):
                    os.close(key.fd)
            self.selector.close()
        if timed_out:
            listed = ", ".join(map(str, timed_out))
            print(f"collectives run: no end after {timeout:g} s; still running: rank {listed}; ended", file=sys.stderr)
            return 124
        return self._report()

    def _serve(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            if isinstance(key.data, _Stream):
                self._read(key.data)
        for rank in self.ranks:
            if rank.code is not None or rank.process.poll() is None:
                continue
            rank.code = rank.process.returncode
            for key in list(self.selector.get_map().values()):
                if key.data is rank:
                    self.selector.unregister(key.fd)
                    os.close(key.fd)
            if rank.code != 0 and not rank.ended_by_us:
                self.failures.append(rank)
                self.settled = self.settled or time.monotonic() + _SETTLING_SECONDS
        if self.settled is not None and time.monotonic() > self.settled and self.deadline is None:
            self._signal_all(signal.SIGTERM)
            self.deadline = time.monotonic() + self.grace

    def _read(self, stream: _Stream) -> bool:
        try:
            data = os.read(stream.source.fileno(), _BLOCK)
        except BlockingIOError:
            return False
        if data:
            stream.feed(data)
            return True
        stream.finish()
        self.selector.unregister(stream.source)
        stream.source.close()
        return False

    def _drain(self) -> None:
        """What the ranks printed last; a descendant that still holds a pipe is not waited for."""
        for key in list(self.selector.get_map().values()):
            stream = key.data
            if isinstance(stream, _Stream):
                while self._read(stream):
                    pass
                stream.finish()

    def _report(self) -> int:
        # Ranks that lost a peer end with an uncaught exception, so with code 1: any other ending is nearer to the cause.
        learnt = self._learnt()
        failures = self.failures or [rank for rank in self.ranks if rank.code]
        failures = [rank for rank in failures if rank.number not in learnt] or failures
        failed = min(failures, key=lambda rank: (rank.code or 0) >= 0 and 1 + (rank.code == 1), default=None)
        if failed is None or failed.code is None:
            return 0
        if failed.code < 0:
            name = signal.Signals(-failed.code).name
            how = f"was killed by {name}" + (
                " (out of memory?)" if name == "SIGKILL" and not failed.ended_by_us else ""
            )
        else:
            how = f"exited with code {failed.code}"
        others = len(self.ranks) - 1
        ending = f"; the other {others} rank{'s were' if others > 1 else ' was'} ended" if others else ""
        print(f"collectives run: rank {failed.number} {how}{ending}", file=sys.stderr, flush=True)
        return failed.code if failed.code > 0 else 128 - failed.code

    def _learnt(self) -> set[int]:
        """The ranks that ended because they learnt of another's failure."""
        os.close(self.learnt_writer)
        try:
            data = os.read(self.learnt, 4 * len(self.ranks))
        except BlockingIOError:
            data = b""
        os.close(self.learnt)
        return {int.from_bytes(data[start : start + 4], "little") for start in range(0, len(data), 4)}

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
        ends = number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
        self._signal_all(signal.SIGKILL if self.interrupts > 1 else number, ours=False)
        if ends and self.deadline is None:
            self.deadline = time.monotonic() + self.grace

    def _signal_all(self, number: int, *, ours: bool = True) -> None:
        for rank in self.ranks:
            if rank.code is None:
                rank.ended_by_us = rank.ended_by_us or ours
                _signal_group(rank.process.pid, number)

    def _kill_all(self) -> None:
        """End what is left of every rank's process group: its descendants too."""
        for rank in self.ranks:
            _signal_group(rank.process.pid, signal.SIGKILL)
            rank.process.wait()


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


def _die_with(parent: int) -> Callable[[], None] | None:
    """What a rank does before it becomes the program: ask the kernel for SIGKILL when the launcher ends."""
    if not sys.platform.startswith("linux"):
        return None
    prctl: Any = ctypes.CDLL(None).prctl

    def prepare() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(127)

    return prepare
