"""Which transport serves a job."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Final

from transports.base import Transport
from transports.environment import Settings, World
from transports.environment import settings as settings_of
from transports.errors import RendezvousError, TransportUnavailable
from transports.inproc import inproc_group
from transports.rendezvous import meet
from transports.shm import connect_shm
from transports.tcp import TcpTransport

NAMES: Final = ("auto", "inproc", "tcp", "mpi", "shm", "cuda_ipc")


_LONGEST_JOIN: Final = 20 * 86400.0
"""Seconds: a socket's timeout must fit into 2³¹ ms."""


def connect(world: World, settings: Settings) -> Transport:
    """The transport of this rank: the one that the settings name, or with `auto` shared memory on one host, else TCP or MPI.

    Raises ValueError for an unknown name, TransportUnavailable, RendezvousError, AuthenticationError.
    """
    check(world, settings)
    name = settings.transport
    if name == "mpi" or (name == "auto" and _meets_over_mpi(world)):
        from transports.mpi import connect_mpi

        return connect_mpi(world)
    if world.size == 1:
        return inproc_group(1)[0]
    patience = min(settings.timeout, _LONGEST_JOIN)
    connections = meet(world, patience)
    if name == "shm" or (name == "auto" and world.one_host):
        try:
            return connect_shm(world.rank, world.size, connections, patience)
        except TransportUnavailable:
            if name == "shm":
                for connection, _ in connections.values():
                    connection.close()
                raise
    return TcpTransport(world.rank, world.size, connections)


def check(world: World, settings: Settings) -> None:
    """Raise what `connect` will raise on all ranks alike, as far as this process can know without the others."""
    name = settings.transport
    if name not in NAMES:
        raise ValueError(f"transport is {name!r}; expected one of {', '.join(NAMES)}")
    if world.size == 1 and name != "mpi":
        return
    if name == "inproc":
        raise TransportUnavailable(
            "inproc joins threads of one process; use collectives.testing.run_ranks, or transport='tcp'"
        )
    if name == "cuda_ipc":
        raise TransportUnavailable("this release has no transport cuda_ipc; use transport='shm', 'tcp' or 'mpi'")
    if name == "shm" and not world.one_host:
        raise TransportUnavailable("transport shm joins ranks of one host only; use transport='tcp' or 'mpi'")
    if name == "mpi" and importlib.util.find_spec("mpi4py") is None:
        raise TransportUnavailable("transport mpi needs mpi4py, which is not installed: pip install 'collectives[mpi]'")
    if name == "mpi" and world.source == "collectives" and world.size > 1:
        raise TransportUnavailable(
            f"transport mpi: the launcher of this package started these {world.size} ranks, so MPI knows nothing of them; "
            "start the ranks with mpirun, or use transport='shm' or 'tcp'"
        )
    if name == "auto" and world.rendezvous is None and not world.one_host and not _meets_over_mpi(world):
        raise RendezvousError(
            f"the ranks of this job ({world.source}) are on several hosts, and no address is given where they meet; set "
            "COLLECTIVES_RENDEZVOUS=host:port on all of them (a free port of rank 0's host), or install mpi4py"
        )


def check_launch(ranks: int, environ: Mapping[str, str] | None = None) -> None:
    """Called before `ranks` processes are started on this host: raise what all of them would for the settings in `environ`.

    Raises ValueError, TransportUnavailable, RendezvousError.
    """
    check(World(0, ranks, 0, ranks, "collectives", "to be started", ("127.0.0.1", 0)), settings_of(environ))


def _meets_over_mpi(world: World) -> bool:
    several_hosts = world.rendezvous is None and not world.one_host and world.size > 1
    return several_hosts and world.source in ("open mpi", "mpich") and importlib.util.find_spec("mpi4py") is not None


def available() -> list[tuple[str, bool, str]]:
    """Every transport: its name, whether it serves here, and why, or why not."""
    mpi = importlib.util.find_spec("mpi4py") is not None
    return [
        ("inproc", True, "threads of one process, for tests"),
        ("tcp", True, "stream sockets"),
        ("mpi", mpi, "mpi4py" if mpi else "mpi4py is not installed: pip install 'collectives[mpi]'"),
        ("shm", hasattr(os, "memfd_create"), "shared memory on one host (Linux)"),
        ("cuda_ipc", False, "not in this release"),
    ]
