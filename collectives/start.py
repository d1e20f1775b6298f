"""How a process becomes a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final, Literal

from collectives.algorithms import find
from collectives.communicator import Communicator
from collectives.costs import agree_on_costs, known_costs
from collectives.job import Job
from collectives.mapped import FIRST_BOARD, new_board
from collectives.select import in_rank_order
from collectives.spec import COLLECTIVES
from transports import connect, environment
from transports import launch as launcher

SETTINGS_CONTEXT: Final = 1 << 30
"""Of the messages by which `init` spreads what rank 0 knows: one that `split` never gives out."""


def init(
    transport: str | None = None,
    *,
    timeout: float | None = None,
    deterministic: bool = False,
    algorithms: Mapping[str, str] | None = None,
) -> Communicator:
    """Join the other ranks of this job and return the communicator of all of them.

    Rank, size and the way to the others come from mpirun (Open MPI, MPICH), srun, torchrun-style variables or
    `python -m collectives run`; a process that was started alone is a job of size 1. Every rank must call it.

    `transport`: auto, shm, tcp or mpi, by default COLLECTIVES_TRANSPORT or auto. `timeout`: seconds for joining and for every
    call, by default COLLECTIVES_TIMEOUT or 300; `math.inf` for no limit. `deterministic`: reduce in rank order and round once,
    so that the bits of a result depend on nothing but the inputs: neither on sizes nor on the algorithm. It must be the same
    on all ranks. `algorithms`: collective -> the algorithm that runs whatever would be chosen, as in
    `{"all_reduce": "ring"}`; the same on all ranks, and with `deterministic` only those that reduce in rank order. It goes before the variable
    COLLECTIVES_ALGORITHMS, as in `all_reduce=ring,broadcast=chain`. `python -m collectives list` prints their names.

    Raises TypeError or ValueError for wrong arguments, RendezvousError (naming the ranks that have not come), AuthenticationError, TransportUnavailable.
    """
    settings = environment.settings()
    forced = {
        **_checked(settings.algorithms, "COLLECTIVES_ALGORITHMS", deterministic),
        **_checked({} if algorithms is None else algorithms, "init: algorithms", deterministic),
    }
    if transport is not None:
        settings = replace(settings, transport=transport)
    if timeout is not None:
        settings = replace(settings, timeout=environment.check_timeout(timeout, "init: timeout"))
    connected = connect.connect(environment.detect(), settings)
    first = new_board(connected, connected.size)
    assert first in (None, FIRST_BOARD)
    boards = None if first is None else [first] * connected.size
    job, ranks = Job(connected, settings.slice_bytes, settings.learnt_fd, forced), range(connected.size)
    if boards is not None:
        # One host, one file; and over shared memory nothing is chosen by costs.
        job.costs = known_costs(settings.cache, connected.name, connected.rank)
    elif connected.size > 1:
        aside = Communicator(job, ranks, SETTINGS_CONTEXT, settings.timeout)
        job.costs = agree_on_costs(settings.cache, connected.name, connected.rank, aside.broadcast)
    return Communicator(job, ranks, 0, settings.timeout, boards, deterministic=deterministic)


def _checked(algorithms: Mapping[str, str], name: str, deterministic: bool = False) -> Mapping[str, str]:
    """The same, if they exist and may run; raises TypeError or ValueError, naming `name`."""
    if not isinstance(algorithms, Mapping):
        raise TypeError(
            f"{name} is {algorithms!r}; expected names of algorithms by collective, as {{'all_reduce': 'ring'}}"
        )
    for collective, algorithm in algorithms.items():
        try:
            entry = find(collective, algorithm)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if deterministic and COLLECTIVES[collective].reduces and not in_rank_order(entry):
            raise ValueError(
                f"{name}: {collective} by {algorithm} does not reduce in rank order, as deterministic=True wants"
            )
    return algorithms


def check_launch(ranks: int) -> None:
    """Called before `launch`: raise what the settings would make every one of `ranks` ranks raise in `init`.

    Raises ValueError or TransportUnavailable for a COLLECTIVES_TRANSPORT that cannot serve, ValueError for unknown
    COLLECTIVES_ALGORITHMS, RendezvousError for other variables.
    """
    connect.check_launch(ranks)
    _checked(environment.settings().algorithms, "COLLECTIVES_ALGORITHMS")


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
