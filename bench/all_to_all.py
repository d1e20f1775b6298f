"""all_to_all: S is the size of every rank's array, one block of which goes to each rank."""

import numpy as np

from bench.harness.case import Case, block, values


def _data(rank, size, count):
    return values(rank, count), np.concatenate([block(values(r, count), rank, size) for r in range(size)])


CASE = Case(
    "all_to_all",
    bus_factor=lambda n: (n - 1) / n,
    moved=lambda n: 2 * n,
    data=_data,
    ours=lambda comm, x, out: comm.all_to_all(x, out),
    mpi=lambda comm, x, out: comm.Alltoall(x, out),
    gloo=lambda dist, x, out: dist.all_to_all_single(out, x),
    blocks=True,
)
