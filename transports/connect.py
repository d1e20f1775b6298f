"""Which transport serves a job."""

from __future__ import annotations

import importlib.util
import os
from typing import Final

from transports.base import Transport
from transports.environment import Settings, World
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
    if name == "cuda_ipc":
        raise TransportUnavailable("this release has no transport cuda_ipc; use transport='shm', 'tcp' or 'mpi'")
    if name == "shm" and not world.one_host:
        raise TransportUnavailable("transport shm joins ranks of one host only; use transport='tcp' or 'mpi'")
    if name == "auto" and world.rendezvous is None and not world.one_host:
        if world.source in ("open mpi", "mpich") and importlib.util.find_spec("mpi4py") is not None:
            from transports.mpi import connect_mpi

            return connect_mpi(world)
        raise RendezvousError(
            f"the ranks of this job ({world.source}) are on several hosts, and no address is given where they meet; set "
            "COLLECTIVES_RENDEZVOUS=host:port on all of them (a free port of rank 0's host), or install mpi4py"
        )
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
