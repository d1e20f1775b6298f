"""all_gather: S is the size of the gathered array, of which every rank gives one block."""

import numpy as np

from bench.harness.case import Case, values


def _data(rank, size, count):
    return values(rank, count // size), np.concatenate([values(r, count // size) for r in range(size)])


def _gloo(dist, x, out):
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(
        out, x
    )  # the name in newer versions, or the older one


CASE = Case(
    "all_gather",
    bus_factor=lambda n: (n - 1) / n,
    moved=lambda n: 1 + n,
    data=_data,
    ours=lambda comm, x, out: comm.all_gather(x, out),
    mpi=lambda comm, x, out: comm.Allgather(x, out),
    gloo=_gloo,
    blocks=True,
)
