"""The one place that reads the environment: who this process is among the ranks of its job, and the settings.

Pure functions over a mapping. Launchers are recognised in this order: our own, torchrun, Open MPI, MPICH and Intel MPI, srun.
"""

from __future__ import annotations

import itertools
import numbers
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from transports.errors import RendezvousError

_DIGITS: Final = re.compile(r"[0-9]{1,18}")
_LOOPBACK: Final = re.compile(r"localhost|127\.[0-9.]+|::1")
_RANGE: Final = r"[0-9]+(?:-[0-9]+)?"
_NODE: Final = rf"(?:[^][,\s]|\[{_RANGE}(?:,{_RANGE})*\])+"
_NODE_LIST: Final = re.compile(rf"{_NODE}(?:,{_NODE})*")
_NODE_PART: Final = re.compile(r"\[([^]]*)\]|([^][]+)")
_SECONDS: Final = "a number of seconds above 0, or inf for no limit"
_PORT_BASE, _PORTS = 20000, 12000  # below the ports that Linux gives to outgoing connections


@dataclass(frozen=True, slots=True)
class World:
    """Who this process is."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """How many of the ranks are on this host; 0: the launcher does not say."""
    source: str
    """collectives, torchrun, open mpi, mpich, srun, or alone."""
    job: str
    """Equal on all ranks of a job."""
    rendezvous: tuple[str, int] | None = None
    """Where rank 0 listens; None: on one host, at an abstract Unix socket named after the job."""
    rendezvous_fd: int | None = None
    """Rank 0's descriptor, already listening there."""
    token: bytes = b""
    """The secret that the ranks prove to each other."""

    @property
    def one_host(self) -> bool:
        """Whether all ranks are on this host, as far as the launcher says."""
        return self.local_size == self.size


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user may set for all programs."""

    transport: str = "auto"
    timeout: float = 300.0
    """Seconds, for the rendezvous and for every call; infinity: no limit."""
    slice_bytes: int | None = None
    cache: Path = Path(".cache")
    """The user's folder for what can be made again."""
    learnt_fd: int | None = None
    """Where a rank tells its launcher that it ends because another one failed."""
    algorithms: Mapping[str, str] = field(default_factory=dict)
    """Two names to each other, which mean something to collectives."""


_LAUNCHERS: Final = {
    # source: rank, size, local rank, local size, job
    "collectives": ("COLLECTIVES_RANK", "COLLECTIVES_SIZE", "COLLECTIVES_LOCAL_RANK", "COLLECTIVES_LOCAL_SIZE", "COLLECTIVES_JOB"),
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"),
    "open mpi": (
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PMIX_NAMESPACE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "PMI_JOBID"),
}  # fmt: skip


def detect(environ: Mapping[str, str] | None = None) -> World:
    """Who this process is; raises RendezvousError naming a variable that is missing or makes no sense."""
    variables = os.environ if environ is None else environ
    for source, names in _LAUNCHERS.items():
        if names[0] in variables and names[1] in variables:
            if source == "mpich" and names[3] not in variables and "SLURM_STEP_ID" in variables:
                break  # srun --mpi=pmi2, which names hosts in variables of its own
            return _world(variables, source, *names)
    if "SLURM_PROCID" in variables and "SLURM_STEP_ID" in variables:
        return _slurm(variables)
    if "PMI_PORT" in variables and "PMI_ID" in variables:
        raise RendezvousError(
            f"mpiexec -pmi-port gave this rank PMI_ID {variables['PMI_ID']}, but not the number of ranks; "
            "start mpiexec without -pmi-port, or set COLLECTIVES_RANK, COLLECTIVES_SIZE and COLLECTIVES_RENDEZVOUS"
        )
    return World(0, 1, 0, 1, "alone", "alone")


def settings(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings; raises RendezvousError naming a variable that makes no sense."""
    variables = os.environ if environ is None else environ
    text = variables.get("COLLECTIVES_TIMEOUT", "300")
    try:
        timeout = check_timeout(float(text), "COLLECTIVES_TIMEOUT")
    except ValueError:
        raise RendezvousError(f"COLLECTIVES_TIMEOUT is {text!r}; expected {_SECONDS}") from None
    slice_bytes = _number(variables, "COLLECTIVES_SLICE_BYTES", 1) if "COLLECTIVES_SLICE_BYTES" in variables else None
    learnt_fd = _number(variables, "COLLECTIVES_LEARNT_FD") if "COLLECTIVES_LEARNT_FD" in variables else None
    cache = Path(variables.get("XDG_CACHE_HOME") or Path(variables.get("HOME", "/")) / ".cache")
    algorithms = _pairs(variables, "COLLECTIVES_ALGORITHMS", "all_reduce=ring,broadcast=chain")
    return Settings(variables.get("COLLECTIVES_TRANSPORT", "auto"), timeout, slice_bytes, cache, learnt_fd, algorithms)


def check_timeout(timeout: object, name: str) -> float:
    """Seconds as a float; raises TypeError or ValueError, naming `name`, for what is no number above 0."""
    if not isinstance(timeout, numbers.Real):
        raise TypeError(f"{name} is {timeout!r} ({type(timeout).__name__}); expected {_SECONDS}")
    try:
        seconds = float(timeout)
    except OverflowError:
        seconds = float("inf") if timeout > 0 else 0.0  # type: ignore[operator]
    if not seconds > 0:
        raise ValueError(f"{name} is {timeout!r}; expected {_SECONDS}")
    return seconds


def _world(
    variables: Mapping[str, str],
    source: str,
    rank_name: str,
    size_name: str,
    local_rank_name: str,
    local_size_name: str,
    job_name: str,
) -> World:
    rank, size = _number(variables, rank_name), _number(variables, size_name, 1)
    if rank >= size:
        raise RendezvousError(f"{rank_name} is {rank} and {size_name} is {size}; expected a rank from 0 to {size - 1}")
    local_rank = _number(variables, local_rank_name) if local_rank_name in variables else rank
    local_size = _number(variables, local_size_name, 1) if local_size_name in variables else 0
    address = _address(variables)
    job = variables.get(job_name) or (_parent() if address is None else "unnamed")
    if source == "torchrun" and (address is None or {"MASTER_ADDR", "MASTER_PORT"} <= variables.keys()):
        master, port = _torchrun_store(variables)
        job = f"torchrun-{master}:{port}-{variables.get(job_name, '')}"  # the run id alone may be `none` for every job
        if not local_size and _LOOPBACK.fullmatch(master):
            local_size = size
        if address is None and local_size != size:
            address = master, _port(job, port)
    elif source == "collectives" or size == 1:
        local_size = local_size or size
    descriptor = _number(variables, "COLLECTIVES_RENDEZVOUS_FD") if "COLLECTIVES_RENDEZVOUS_FD" in variables else None
    return World(rank, size, local_rank, local_size, source, job, address, descriptor, _token(variables))


def _slurm(variables: Mapping[str, str]) -> World:
    """A step of srun; across hosts rank 0 listens on the first host of the step, at a port drawn from job and step."""
    rank = _number(variables, "SLURM_PROCID")
    size = _number(variables, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS", 1)
    nodes = _number(variables, "SLURM_STEP_NUM_NODES", 1) if "SLURM_STEP_NUM_NODES" in variables else 1
    local_rank = _number(variables, "SLURM_LOCALID") if "SLURM_LOCALID" in variables else rank
    node = _number(variables, "SLURM_NODEID") if "SLURM_NODEID" in variables else 0
    per_node = _tasks_per_node(variables.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_size = size if nodes == 1 else per_node[node] if node < len(per_node) else 0
    job = f"slurm-{variables.get('SLURM_JOB_ID', '0')}.{variables['SLURM_STEP_ID']}"
    address = _address(variables)
    if address is None and nodes > 1:
        nodes_of_step = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST", "")
        address = hosts(nodes_of_step)[0], _port(job)
    return World(rank, size, local_rank, local_size, "srun", job, address, None, _token(variables))


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as 2, 2, 2, 1."""
    return [
        int(count) for count, times in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", text) for _ in range(int(times or 1))
    ]


def hosts(nodes: str) -> list[str]:
    """The hosts of Slurm's list in its order, as in `gpu[01-03,07],login2` or `rack[0-1]node[2-3]-ib`.

    Raises RendezvousError for anything else.
    """
    names: list[str] = []
    if _NODE_LIST.fullmatch(nodes):
        for entry in re.split(r",(?![^\[]*\])", nodes):
            parts = [_numbers(ranges) if ranges else [text] for ranges, text in _NODE_PART.findall(entry)]
            names += map("".join, itertools.product(*parts))
    if not names:
        raise RendezvousError(f"SLURM_STEP_NODELIST is {nodes!r}; expected a list of hosts such as gpu[01-03,07]")
    return names


def _numbers(ranges: str) -> list[str]:
    """`001-003,7` as 001, 002, 003, 7."""
    numbers: list[str] = []
    for bounds in ranges.split(","):
        first, _, last = bounds.partition("-")
        numbers += [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def _torchrun_store(variables: Mapping[str, str]) -> tuple[str, int]:
    """Where torch's own store listens: an address that we must leave alone."""
    if "MASTER_ADDR" not in variables:
        raise RendezvousError(
            "RANK and WORLD_SIZE are set, but not MASTER_ADDR; set it, with MASTER_PORT, or COLLECTIVES_RENDEZVOUS"
        )
    return variables["MASTER_ADDR"], _number(variables, "MASTER_PORT", 1)


def _port(job: str, taken: int = 0) -> int:
    """A port drawn from the job's name, so that all ranks know it and jobs seldom share one; never `taken`."""
    drawn = zlib.crc32(job.encode()) % _PORTS
    port = _PORT_BASE + drawn
    return port if port != taken else _PORT_BASE + (drawn + 1) % _PORTS


def _address(variables: Mapping[str, str]) -> tuple[str, int] | None:
    text = variables.get("COLLECTIVES_RENDEZVOUS")
    if text is None:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not host or not _DIGITS.fullmatch(port) or not 0 < int(port) < 65536:
        raise RendezvousError(
            f"COLLECTIVES_RENDEZVOUS is {text!r}; expected host:port, as in 10.0.0.1:29400 or [::1]:29400"
        )
    return host.strip("[]"), int(port)


def _token(variables: Mapping[str, str]) -> bytes:
    text = variables.get("COLLECTIVES_TOKEN", "")
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise RendezvousError(
            "COLLECTIVES_TOKEN is not a string of hexadecimal digits; set it alike on all ranks"
        ) from None


def _pairs(variables: Mapping[str, str], name: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in variables.get(name, "").split(","))):
        left, equals, right = (word.strip() for word in entry.partition("="))
        if not (left and equals and right) or left in pairs:
            raise RendezvousError(f"{name} is {variables[name]!r}; expected names once each, as in {example}")
        pairs[left] = right
    return pairs


def _number(variables: Mapping[str, str], name: str, least: int = 0) -> int:
    text = variables.get(name)
    if text is None:
        raise RendezvousError(
            f"{name} is not set, though the launcher's other variables are; expected a number from {least}"
        )
    if not _DIGITS.fullmatch(text) or int(text) < least:
        raise RendezvousError(f"{name} is {text!r}; expected a number from {least}")
    return int(text)


def _parent() -> str:
    """A name for the launcher that started this process, for launchers that give the job none: its process and start time."""
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = "0"
    return f"parent-{parent}-{started}"
