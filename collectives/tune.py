"""`python -m collectives tune`: what the links between ranks cost, measured by real calls, for `select` to choose by.

Every number is a difference between two calls that differ in that one thing, so that what they share cancels out. With two
ranks a one-hop all_reduce is one step of one message each way, and a ring all_reduce is two of them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import kernels
from collectives.communicator import Communicator
from collectives.costs import LinkCosts, costs_file, save
from collectives.errors import CommunicationError
from collectives.job import DEFAULT_SLICE_BYTES
from collectives.start import init, launch, under_launcher
from kernels import ReduceOp
from transports import environment
from transports.connect import available

_SMALL, _LARGE = 1 << 20, 8 << 20
_SHORT = 64


@dataclass(frozen=True)
class _Experiment:
    """A call to be timed, `repeats` times in a row, by a given algorithm and slice size."""

    collective: str
    algorithm: str
    call: Callable[[], object]
    repeats: int
    slice_bytes: int = DEFAULT_SLICE_BYTES


def measure(comm: Communicator, rounds: int = 40) -> LinkCosts:
    """The costs of the links between the two ranks of a world of its own; the same result on both.

    The experiments alternate, and the least time of each counts: whatever else the machine does only adds to it.
    """
    if comm.maps_memory:
        return _measure_mapped(comm, rounds)
    pair, me = np.ones(2, np.float32), comm.rank
    short, small, large = (np.ones((2, nbytes), np.uint8) for nbytes in (65 * _SHORT, _SMALL, _LARGE))
    experiments = {
        "one step": _Experiment("all_reduce", "one_hop", lambda: comm.all_reduce(pair), 20),
        "two steps": _Experiment("all_reduce", "ring", lambda: comm.all_reduce(pair), 20),
        "whole": _Experiment("all_gather", "direct", lambda: comm.all_gather(short[me], short), 5, short.nbytes),
        "65 slices": _Experiment("all_gather", "direct", lambda: comm.all_gather(short[me], short), 5, _SHORT),
        "small": _Experiment("all_gather", "direct", lambda: comm.all_gather(small[me], small), 3),
        "large": _Experiment("all_gather", "direct", lambda: comm.all_gather(large[me], large), 1),
    }
    job, least = comm._job, dict.fromkeys(experiments, math.inf)
    for _ in range(rounds):
        for name, experiment in experiments.items():
            job.algorithms, job.slice_bytes = {experiment.collective: experiment.algorithm}, experiment.slice_bytes
            comm.barrier()
            began = time.perf_counter()
            for _ in range(experiment.repeats):
                experiment.call()
            least[name] = min(least[name], (time.perf_counter() - began) / experiment.repeats)
    job.algorithms, job.slice_bytes = {}, DEFAULT_SLICE_BYTES
    times = dict(zip(least, comm.all_reduce(np.array([*least.values()]), ReduceOp.MAX).tolist(), strict=True))
    reduced = float(comm.all_reduce(np.array([_reduced_byte(rounds)]), ReduceOp.MAX)[0])
    step, message = times["two steps"] - times["one step"], max((times["65 slices"] - times["whole"]) / 64, 0.0)
    more = _LARGE - _SMALL
    byte = (times["large"] - times["small"] - message * more / DEFAULT_SLICE_BYTES) / more
    call = max(times["one step"] - step, 0.0)
    return LinkCosts(call, max(step - message, 0.0), message, max(byte, 0.0), reduced)


def _measure_mapped(comm: Communicator, rounds: int) -> LinkCosts:
    """Over shared memory there are no messages: a call costs what it costs one rank alone, a hop what two ranks take longer."""
    alone = comm.split(comm.rank)
    assert alone is not None
    pair, small, large = np.ones(2, np.float32), *(np.ones((2, nbytes), np.uint8) for nbytes in (_SMALL, _LARGE))
    experiments: dict[str, tuple[Callable[[], object], int]] = {
        "alone": (lambda: alone.all_reduce(pair), 1000),
        "hop": (lambda: comm.all_reduce(pair), 1000),
        "small": (lambda: comm.all_gather(small[comm.rank], small), 3),
        "large": (lambda: comm.all_gather(large[comm.rank], large), 1),
    }
    least = dict.fromkeys(experiments, math.inf)
    for _ in range(rounds):
        for name, (call, repeats) in experiments.items():
            comm.barrier()
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            least[name] = min(least[name], (time.perf_counter() - began) / repeats)
    times = dict(zip(least, comm.all_reduce(np.array([*least.values()]), ReduceOp.MAX).tolist(), strict=True))
    reduced = float(comm.all_reduce(np.array([_reduced_byte(rounds)]), ReduceOp.MAX)[0])
    byte = (times["large"] - times["small"]) / (_LARGE - _SMALL)
    return LinkCosts(times["alone"], max(times["hop"] - times["alone"], 0.0), 0.0, max(byte, 0.0), reduced)


def _reduced_byte(rounds: int) -> float:
    """Seconds for each byte added, slice after slice through more memory than the caches hold."""
    a, b = np.ones(_LARGE // 4, np.float32), np.ones(_LARGE // 4, np.float32)
    count, times = DEFAULT_SLICE_BYTES // 4, []
    for _ in range(rounds):
        began = time.perf_counter()
        for start in range(0, a.size, count):
            part = slice(start, start + count)
            kernels.reduce(ReduceOp.MAX, a[part], b[part], a[part])
        times.append(time.perf_counter() - began)
    return min(times) / a.nbytes


def tune(_: argparse.Namespace) -> int:
    """Measure every transport that joins these ranks, or two that are started here; rank 0 keeps and prints the result."""
    if not under_launcher():
        return launch([sys.executable, "-m", "collectives", "tune"], 2, output="rank0")
    found: dict[str, LinkCosts] = {}
    rank, path = environment.detect().rank, costs_file(environment.settings().cache)
    for name, serves, _reason in available():
        if not serves or name == "inproc":
            continue
        try:
            with init(name) as comm:
                if comm.size != 2:
                    raise ValueError(f"tune measures between 2 ranks, and this job has {comm.size}")
                found[name] = measure(comm)
        except CommunicationError as error:
            if rank == 0:
                print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        if rank == 0:
            print(f"{name}: {found[name]}")
    if rank == 0 and found:
        save(path, found)
        print(f"kept in {path}")
    return 0 if found else 1
