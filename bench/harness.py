"""Runs a case over every contestant, alternating, and prints the table of nccl-tests.

A case is a module of this package with a `CASE`. Contestants are this library over each transport, and peers: the MPI library
under mpi4py, and Gloo through torch where it is installed. All run in the same processes, one after the other in every round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import collectives as cc

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Case:
    """What one file describes; arrays hold small whole numbers, so that every order of reduction is exact.

    `prepare(rank, size, count)` returns (input, output, expected output); count is that of the whole buffer, a multiple of
    the size. Each of `ours`, `mpi` and `gloo` runs the collective once on (its communicator, input, output).
    """

    name: str
    bus_factor: Callable[[int], float]
    redop: str
    prepare: Callable[[int, int, int], tuple[Array, Array, Array]]
    ours: Callable[[Any, Array, Array], object]
    mpi: Callable[[Any, Array, Array], object]
    gloo: Callable[[Any, Array, Array], object] | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to run the case."""

    name: str
    run: Callable[[Case, Array, Array], object]
    has: Callable[[Case], bool]


def values(rank: int, count: int) -> Array:
    """What rank contributes: exact in float32 under any sum over up to 2¹⁶ ranks."""
    return ((np.arange(count, dtype=np.int64) * 7 + rank * 3) % 61).astype(np.float32)


def contestants(transports: list[str], peers: list[str], say: Callable[[str], None]) -> tuple[Any, list[Contestant]]:
    """The contestants that can run here, and a communicator to keep the ranks together."""
    found: list[Contestant] = []
    first: Any = None
    for name in transports:
        try:
            comm = cc.init(name)
        except cc.CommunicationError as error:
            say(f"{name} is left out: {error}")
            continue
        first = first or comm
        found.append(Contestant(name, lambda case, x, out, comm=comm: case.ours(comm, x, out), lambda case: True))
    if first is None:
        raise SystemExit("no transport can run here")
    for name in peers:
        reason = _add_mpi(found, name) if name in ("openmpi", "mpich") else _add_gloo(found, first)
        if reason:
            say(f"{name} is left out: {reason}")
    return first, found


def _add_mpi(found: list[Contestant], name: str) -> str:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return str(error)
    vendor = MPI.get_vendor()[0].lower().replace(" ", "")
    if vendor != name:
        return f"these processes run under {MPI.get_vendor()[0]}"
    if MPI.COMM_WORLD.Get_size() == 1:
        return "not started by its mpirun"
    found.append(Contestant(name, lambda case, x, out: case.mpi(MPI.COMM_WORLD, x, out), lambda case: True))
    return ""


def _add_gloo(found: list[Contestant], comm: cc.Communicator) -> str:
    try:
        import torch.distributed as dist
    except ImportError:
        return "torch is not installed"
    port = np.zeros(1, np.int64)
    if comm.rank == 0:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as free:
            port[0] = free.getsockname()[1]
    comm.broadcast(port)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port[0]}", rank=comm.rank, world_size=comm.size)
    found.append(
        Contestant(
            "gloo", lambda case, x, out: case.gloo and case.gloo(dist, x, out), lambda case: case.gloo is not None
        )
    )
    return ""


@dataclass
class Row:
    """One line of the table; times are medians over the iterations, of the slowest rank in each."""

    collective: str
    contestant: str
    ranks: int
    size: int
    count: int
    redop: str
    microseconds: float
    algbw: float
    busbw: float
    wrong: int
    ratio: float | None = None
    """The best peer's time ÷ this one's; None for peers and where no peer ran."""


def measure(case: Case, count: int, comm: cc.Communicator, runners: list[Contestant], iterations: int) -> list[Row]:
    """Time every contestant on `count` float32 elements, alternating in each of the iterations.

    Small sizes run up to 50 times in a row and the mean is taken, as nccl-tests does.
    """
    running = [runner for runner in runners if runner.has(case)]
    times = np.zeros((len(running), iterations))
    wrong = np.zeros(len(running), np.int64)
    repeats = max(1, min(50, (1 << 20) // (count * 4)))
    for iteration in range(iterations):
        for number, runner in enumerate(running):
            x, out, expected = case.prepare(comm.rank, comm.size, count)
            comm.barrier()
            runner.run(case, x, out)  # warms up, and brings the ranks together in the contestant's own way
            wrong[number] += int((out != expected).sum())
            x[:] = 0
            began = time.perf_counter()
            for _ in range(repeats):
                runner.run(case, x, out)
            times[number, iteration] = (time.perf_counter() - began) / repeats
    comm.all_reduce(times, cc.ReduceOp.MAX)
    comm.all_reduce(wrong)
    size = count * 4
    rows = []
    for number, runner in enumerate(running):
        seconds = float(np.median(times[number]))
        algbw = size / seconds / 1e9
        rows.append(
            Row(case.name, runner.name, comm.size, size, count, case.redop, seconds * 1e6, algbw,
                algbw * case.bus_factor(comm.size), int(wrong[number]))
        )  # fmt: skip
    peers = [row.microseconds for row in rows if row.contestant in ("openmpi", "mpich", "gloo")]
    for row in rows:
        if peers and row.contestant not in ("openmpi", "mpich", "gloo"):
            row.ratio = min(peers) / row.microseconds
    return rows


HEADER = (
    f"{'size':>10} {'count':>10} {'type':>7} {'redop':>6} {'with':>8} {'time':>10} {'algbw':>7} {'busbw':>7} {'#wrong':>6} {'ratio':>6}\n"
    f"{'(B)':>10} {'(elements)':>10} {'':>7} {'':>6} {'':>8} {'(µs)':>10} {'(GB/s)':>7} {'(GB/s)':>7} {'':>6} {'':>6}"
)


def line(row: Row) -> str:
    """The row as printed."""
    ratio = f"{row.ratio:6.2f}" if row.ratio is not None else ""
    return (
        f"{row.size:10} {row.count:10} {'float32':>7} {row.redop:>6} {row.contestant:>8} {row.microseconds:10.1f} "
        f"{row.algbw:7.2f} {row.busbw:7.2f} {row.wrong:6} {ratio:>6}"
    )
