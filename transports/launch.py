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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from transports.launch_output import Stream, Writer

_FORWARDED: Final = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_COLOURS: Final = (36, 33, 32, 35, 34, 31)
_BLOCK: Final = 1 << 16
_SETTLING_SECONDS: Final = 1.0
"""After the first failure, for the others to say what they met."""
_STRAY_SECONDS: Final = 2.0
"""For descendants of ranks to end that were killed."""
_READER_SECONDS: Final = 0.5
"""After a signal to end, for whoever reads our output to take the rest."""
OUTPUTS: Final = ("auto", "prefix", "colour", "rank0", "raw")


class LaunchError(Exception):
    """The job could not be started; the message is one line."""


@dataclass(slots=True, eq=False)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    ended_by_us: bool = False
    code: int | None = None


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
    ranks then get SIGTERM and, `grace` seconds later, SIGKILL. Signals that arrive are forwarded to every rank; a second
    SIGINT kills them. When the call returns, no process of the job is left.

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
        self.command, self.name, self.grace = list(command), _name_of(command), grace
        self.selector = selectors.DefaultSelector()
        self.ranks: list[_Rank] = []
        self.failures: list[_Rank] = []
        self.settled: float | None = None
        self.deadline: float | None = None
        self.interrupts = 0
        self.told_to_end: float | None = None
        self.wake, wake_writer = os.pipe()
        os.set_blocking(wake_writer, False)
        self.wake_writer = wake_writer
        self.selector.register(self.wake, selectors.EVENT_READ)
        self.writer = Writer(self._room)
        self.paused: list[Stream] = []
        if output == "auto":
            output = "colour" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else "prefix"
        self.output = output
        self.job = secrets.token_hex(8)
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
                COLLECTIVES_JOB=self.job,
            )
            variables.pop("COLLECTIVES_RENDEZVOUS_FD", None)
            for number in range(ranks):
                try:
                    self._start(number, variables, listener)
                except BaseException as error:
                    self._kill_all()
                    if not isinstance(error, OSError):
                        raise
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
                self.selector.register(
                    source, selectors.EVENT_READ, Stream(source, sink, self.writer, *self._decoration(number))
                )
        if hasattr(os, "pidfd_open"):
            self.selector.register(os.pidfd_open(process.pid), selectors.EVENT_READ, rank)

    def _decoration(self, number: int) -> tuple[bytes, bytes]:
        text = f"[{number}] "
        if self.output != "colour":
            return text.encode(), b""
        return f"\x1b[{_COLOURS[number % len(_COLOURS)]}m{text}\x1b[0m".encode(), b""

    def run(self, timeout: float | None) -> int:
        """Serve the ranks until all have ended."""
        previous = {getattr(signal, name): signal.signal(getattr(signal, name), self._forward) for name in _FORWARDED}
        try:
            self.writer.start()
            timed_out = self._supervise(timeout)
            self._kill_all()
            self._drain()
            code, line = self._verdict()
            if timed_out:
                listed = ", ".join(map(str, timed_out))
                code, line = 124, f"no end of {self.name} after {timeout:g} s; still running: rank {listed}; ended"
            if line:
                self.writer.put(2, f"collectives run: {line}\n".encode(errors="replace"))
            self._flush()
            self._check_writer()
            return code
        except OSError as error:
            if error is not self.writer.error:
                raise
            if isinstance(error, BrokenPipeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                return 128 + signal.SIGPIPE
            print(f"collectives run: what {self.name} prints cannot be written: {error.strerror}", file=sys.stderr)
            return 1
        finally:
            self._kill_all()
            for number, handler in previous.items():
                signal.signal(number, handler)
            for key in list(self.selector.get_map().values()):
                if isinstance(key.data, _Rank):
                    os.close(key.fd)
            self.selector.close()
            self.writer.stop()
            os.close(self.wake)
            os.close(self.wake_writer)

    def _supervise(self, timeout: float | None) -> list[int]:
        """Until all ranks have ended; returns those that ran when the time was over."""
        expiry = None if timeout is None else time.monotonic() + timeout
        timed_out: list[int] = []
        while any(rank.code is None for rank in self.ranks):
            self._serve(0.2)
            self._check_writer()
            now = time.monotonic()
            if expiry is not None and now > expiry and not timed_out:
                timed_out = [rank.number for rank in self.ranks if rank.code is None]
                self._signal_all(signal.SIGABRT)
                self.deadline = now + min(self.grace, 2.0)
            if self.deadline is not None and now > self.deadline:
                self._signal_all(signal.SIGKILL)
        return timed_out

    def _check_writer(self) -> None:
        if self.writer.error is not None:
            raise self.writer.error

    def _flush(self) -> None:
        """Wait for whoever reads our output, as long as nobody tells us to end."""
        while not self.writer.flushed(0.1):
            if self.told_to_end is not None and time.monotonic() > self.told_to_end + _READER_SECONDS:
                break

    def _room(self) -> None:
        """Called by the writer's thread: look at the streams again."""
        try:
            os.write(self.wake_writer, b"\0")
        except OSError:
            pass

    def _serve(self, seconds: float) -> None:
        if not self.writer.full:
            for stream in self.paused:
                self.selector.register(stream.source, selectors.EVENT_READ, stream)
            self.paused.clear()
        for key, _ in self.selector.select(seconds):
            if key.fd == self.wake:
                os.read(self.wake, _BLOCK)
            elif isinstance(key.data, Stream) and not self.writer.full:
                self._read(key.data)
            elif isinstance(key.data, Stream):
                self.selector.unregister(key.data.source)
                self.paused.append(key.data)
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

    def _read(self, stream: Stream) -> bool:
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
        for stream in self.paused:
            self.selector.register(stream.source, selectors.EVENT_READ, stream)
        for key in list(self.selector.get_map().values()):
            stream = key.data
            if isinstance(stream, Stream):
                while self._read(stream):
                    pass
                stream.finish()

    def _verdict(self) -> tuple[int, str]:
        """The exit code, and the line that says whose it is."""
        # Ranks that lost a peer end with an uncaught exception, so with code 1: any other ending is nearer to the cause.
        learnt = self._learnt()
        failures = self.failures or [rank for rank in self.ranks if rank.code]
        failures = [rank for rank in failures if rank.number not in learnt] or failures
        failed = min(failures, key=lambda rank: (rank.code or 0) >= 0 and 1 + (rank.code == 1), default=None)
        if failed is None or failed.code is None:
            return 0, ""
        if failed.code < 0:
            name = signal.Signals(-failed.code).name
            how = f"was killed by {name}" + (
                " (out of memory?)" if name == "SIGKILL" and not failed.ended_by_us else ""
            )
        else:
            how = f"exited with code {failed.code}"
        others = len(self.ranks) - 1
        ending = f"; the other {others} rank{'s were' if others > 1 else ' was'} ended" if others else ""
        line = f"rank {failed.number} of {self.name} {how}{ending}"
        return failed.code if failed.code > 0 else 128 - failed.code, line

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
        if ends:
            self.told_to_end = time.monotonic()
        self._signal_all(signal.SIGKILL if self.interrupts > 1 else number, ours=False)
        if ends and self.deadline is None:
            self.deadline = time.monotonic() + self.grace

    def _signal_all(self, number: int, *, ours: bool = True) -> None:
        for rank in self.ranks:
            if rank.code is None:
                rank.ended_by_us = rank.ended_by_us or ours
                _signal_group(rank.process.pid, number)

    def _kill_all(self) -> None:
        """End what is left of the job: every rank's process group, and descendants that have left it."""
        for rank in self.ranks:
            _signal_group(rank.process.pid, signal.SIGKILL)
            rank.process.wait()
        deadline = time.monotonic() + _STRAY_SECONDS
        while (strays := _processes_of(self.job)) and time.monotonic() < deadline:
            for process in strays:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            os.sched_yield()


def _name_of(command: Sequence[str]) -> str:
    """What a user calls the program: a script's name, or that of a module."""
    arguments = iter(command[1:])
    if Path(command[0]).name.startswith("python"):
        for argument in arguments:
            if argument == "-m":
                return next(arguments, argument)
            if not argument.startswith("-") or argument == "-c":
                return Path(argument).name
    return Path(command[0]).name


def _processes_of(job: str) -> list[int]:
    """The living processes that have the job's name in their environment, where /proc tells."""
    mark = f"COLLECTIVES_JOB={job}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue  # it has ended, or is another user's
    return found


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
