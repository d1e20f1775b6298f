"""The ways to run a case: this library over each of its transports, and its peers. Each binds what its process has.

A contestant that cannot run here raises Unavailable with the reason, in time for the others to run without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import collectives as cc
from bench.harness.case import Array, Call, Case
from transports import environment

_VENDORS: Final = {"Open MPI": "openmpi", "MPICH": "mpich", "Intel MPI": "impi"}


class Unavailable(Exception):
    """This contestant cannot run in this process; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """One way to run a case, on the ranks of this process's job."""

    description: str
    comm: Any
    """What the call of the case takes first."""
    call: Callable[[Case], Call | None]
    barrier: Callable[[], object]
    empty: Callable[[int], Array] | None = None
    """Makes the arrays; None: ordinary memory serves."""
    view: Callable[[Array], Any] = lambda array: array
    """What the call takes in place of a numpy array."""


def join(name: str, store: str | None, crowded: bool) -> Contestant:
    """Join the other ranks of the job as this contestant.

    `store` is a path in a folder that they share, for Gloo; `crowded` says that there are more ranks than cores.
    """
    if name in _VENDORS.values():
        return _mpi(name, crowded)
    if name == "gloo":
        return _gloo(store)
    if name == "mpi":
        mpi(crowded)  # before the transport imports it
    try:
        comm = cc.init("shm" if name == "heap" else name)
    except (cc.CommunicationError, ValueError) as error:
        raise Unavailable(str(error)) from None
    if name == "heap":
        return Contestant("this library, arrays from comm.empty", comm, _ours, comm.barrier, comm.empty)
    return Contestant("this library, ordinary arrays", comm, _ours, comm.barrier)


def _ours(case: Case) -> Call:
    return case.ours


def mpi(crowded: bool) -> tuple[Any, str]:
    """mpi4py's module, and the name of the library that it is bound to."""
    try:
        import mpi4py

        # MPI libraries are fastest without locks. But MPICH, which spins, yields the processor only where threads may run:
        # with more ranks than cores a call would take milliseconds.
        mpi4py.rc.threads = crowded
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise Unavailable(str(error).partition("\n")[0]) from None
    vendor = MPI.get_vendor()[0]
    return MPI, _VENDORS.get(vendor, vendor)


def _mpi(name: str, crowded: bool) -> Contestant:
    module, found = mpi(crowded)
    world = module.COMM_WORLD
    if found != name:
        raise Unavailable(f"mpi4py is bound to {found} here")
    if world.Get_size() != environment.detect().size:
        raise Unavailable(
            f"the job has {environment.detect().size} ranks, and MPI sees {world.Get_size()}: not its mpirun"
        )
    library = " ".join(module.Get_library_version().partition(",")[0].split("\n")[0].split())
    if name == "mpich":
        library = "MPICH " + ".".join(map(str, module.get_vendor()[1]))
    return Contestant(library, world, lambda case: case.mpi, world.Barrier)


def _gloo(store: str | None) -> Contestant:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        raise Unavailable(f"torch: {error}") from None
    torch.set_num_threads(1)
    world = environment.detect()
    dist.init_process_group("gloo", f"file://{store}", rank=world.rank, world_size=world.size)
    return Contestant(f"torch {torch.__version__}", dist, lambda case: case.gloo, dist.barrier, view=torch.from_numpy)
