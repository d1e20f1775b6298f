"""gather to rank 0: S is the size of the gathered array, of which every rank gives one block."""

import numpy as np

from bench.harness.case import Case, nothing, values


def _data(rank, size, count):
    parts = [values(r, count // size) for r in range(size)]
    return parts[rank], np.concatenate(parts) if rank == 0 else nothing()


CASE = Case(
    "gather",
    bus_factor=lambda n: (n - 1) / n,
    moved=lambda n: 2,
    data=_data,
    ours=lambda comm, x, out: comm.gather(x, out=out if comm.rank == 0 else None),
    mpi=lambda comm, x, out: comm.Gather(x, out if comm.rank == 0 else None),
    gloo=lambda dist, x, out: dist.gather(x, list(out.split(len(x))) if len(out) else None),
    root=0,
    blocks=True,
)
