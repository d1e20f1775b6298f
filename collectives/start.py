"""How a process becomes a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal

from collectives.communicator import Communicator
from collectives.costs import agree_on_costs, known_costs
from collectives.job import Job
from collectives.mapped import FIRST_BOARD, new_board
from transports import connect, environment
from transports import launch as launcher

SETTINGS_CONTEXT: Final = 1 << 30
"""Of the messages by which `init` spreads what rank 0 knows: one that `split` never gives out."""


def init(transport: str | None = None, *, timeout: float | None = None, deterministic: bool = False) -> Communicator:
    """Join the other ranks of this job and return the communicator of all of them.

    Rank, size and the way to the others come from mpirun (Open MPI, MPICH), srun, torchrun-style variables or
    `python -m collectives run`; a process that was started alone is a job of size 1. Every rank must call it.

    `transport`: auto, tcp or mpi, by default COLLECTIVES_TRANSPORT or auto. `timeout`: seconds for joining and for every
    call, by default COLLECTIVES_TIMEOUT or 300; `math.inf` for no limit. `deterministic`: reduce in rank order and round once,
    so that the bits of a result depend on nothing but the inputs: neither on sizes nor on the algorithm. It must be the same
    on all ranks.

    Raises TypeError or ValueError for wrong arguments, RendezvousError (naming the ranks that have not come), AuthenticationError, TransportUnavailable.
    """
    settings = environment.settings()
    if transport is not None:
        settings = replace(settings, transport=transport)
    if timeout is not None:
        settings = replace(settings, timeout=environment.check_timeout(timeout, "init: timeout"))
    connected = connect.connect(environment.detect(), settings)
    first = new_board(connected, connected.size)
    assert first in (None, FIRST_BOARD)
    boards = None if first is None else [first] * connected.size
    job, ranks = Job(connected, settings.slice_bytes, settings.learnt_fd), range(connected.size)
    if boards is not None:
        # One host, one file; and over shared memory nothing is chosen by costs.
        job.costs = known_costs(settings.cache, connected.name, connected.rank)
    elif connected.size > 1:
        aside = Communicator(job, ranks, SETTINGS_CONTEXT, settings.timeout)
        job.costs = agree_on_costs(settings.cache, connected.name, connected.rank, aside.broadcast)
    return Communicator(job, ranks, 0, settings.timeout, boards, deterministic=deterministic)


def check_launch(ranks: int) -> None:
    """Called before `launch`: raise what the settings would make every one of `ranks` ranks raise in `init`.

    Raises ValueError or TransportUnavailable for a COLLECTIVES_TRANSPORT that cannot serve, RendezvousError for other variables.
    """
    connect.check_launch(ranks)


def launched_rank() -> int:
    """The rank that the launcher gave this process, 0 for one that was started alone; raises RendezvousError as `init` does."""
    return environment.detect().rank


def under_launcher() -> bool:
    """Whether this process was started as a rank of a job, by any launcher."""
    return environment.detect().source != "alone"


def launch(
    command: Sequence[str],
    ranks: int,
    *,
    output: Literal["prefix", "colour", "rank0", "raw"] = "prefix",
    variables: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> int:
    """Start `ranks` processes of `command` on this host, as `python -m collectives run` does; returns the exit code.

    `output`: how what the ranks print is shown; with rank0, rank 0 has the terminal to itself and the others are prefixed.
    `variables`: further environment variables. `timeout`: seconds after which all ranks are ended.
    """
    return launcher.launch(command, ranks, output=output, environment=variables, timeout=timeout)
