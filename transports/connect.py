"""Which transport serves a job."""

from __future__ import annotations

import importlib.util
from typing import Final

from transports.base import Transport
from transports.environment import Settings, World
from transports.errors import RendezvousError, TransportUnavailable
from transports.inproc import inproc_group
from transports.rendezvous import meet
from transports.tcp import TcpTransport

NAMES: Final = ("auto", "inproc", "tcp", "mpi", "shm", "cuda_ipc")


def connect(world: World, settings: Settings) -> Transport:
    """The transport of this rank: the one that the settings name, or with `auto` TCP, and MPI across hosts under mpirun.

    Raises ValueError for an unknown name, TransportUnavailable, RendezvousError, AuthenticationError.
    """
    name = settings.transport
    if name not in NAMES:
        raise ValueError(f"transport is {name!r}; expected one of {', '.join(NAMES)}")
    if name == "mpi":
        from transports.mpi import connect_mpi

        return connect_mpi(world)
    if world.size == 1:
        return inproc_group(1)[0]
    if name == "inproc":
        raise TransportUnavailable(
            "inproc joins threads of one process; use collectives.testing.run_ranks, or transport='tcp'"
        )
    if name in ("shm", "cuda_ipc"):
        raise TransportUnavailable(f"this release has no transport {name}; use transport='tcp' or 'mpi'")
    if name == "auto" and world.rendezvous is None and not world.one_host:
        if world.source in ("open mpi", "mpich") and importlib.util.find_spec("mpi4py") is not None:
            from transports.mpi import connect_mpi

            return connect_mpi(world)
        raise RendezvousError(
            f"the ranks of this job ({world.source}) are on several hosts, and no address is given where they meet; set "
            "COLLECTIVES_RENDEZVOUS=host:port on all of them (a free port of rank 0's host), or install mpi4py"
        )
    return TcpTransport(world.rank, world.size, meet(world, settings.timeout))


def available() -> list[tuple[str, bool, str]]:
    """Every transport: its name, whether it serves here, and why, or why not."""
    mpi = importlib.util.find_spec("mpi4py") is not None
    return [
        ("inproc", True, "threads of one process, for tests"),
        ("tcp", True, "stream sockets"),
        ("mpi", mpi, "mpi4py" if mpi else "mpi4py is not installed: pip install 'collectives[mpi]'"),
        ("shm", False, "not in this release"),
        ("cuda_ipc", False, "not in this release"),
    ]
