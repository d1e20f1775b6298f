"""scatter from rank 0: S is the size of the scattered array, of which every rank gets one block."""

from bench.harness.case import Case, block, nothing, values


def _data(rank, size, count):
    return values(0, count) if rank == 0 else nothing(), block(values(0, count), rank, size)


CASE = Case(
    "scatter",
    bus_factor=lambda n: (n - 1) / n,
    moved=lambda n: 2,
    data=_data,
    ours=lambda comm, x, out: comm.scatter(x if comm.rank == 0 else None, out=out),
    mpi=lambda comm, x, out: comm.Scatter(x if comm.rank == 0 else None, out),
    gloo=lambda dist, x, out: dist.scatter(out, list(x.split(len(out))) if len(x) else None),
    root=0,
    blocks=True,
)
