"""reduce to rank 0, in place: S is the size of every rank's array. What the others hold afterwards is not compared."""

from bench.harness.case import Case, nothing, total, values


def _mpi(comm, x, out):
    from mpi4py import MPI

    comm.Reduce(MPI.IN_PLACE if comm.rank == 0 else x, x if comm.rank == 0 else None)


CASE = Case(
    "reduce",
    bus_factor=lambda n: 1.0,
    moved=lambda n: n + 1,
    data=lambda rank, size, count: (values(rank, count), total(size, count) if rank == 0 else nothing()),
    ours=lambda comm, x, out: comm.reduce(x, out=x if comm.rank == 0 else None),
    mpi=_mpi,
    gloo=lambda dist, x, out: dist.reduce(x, 0),
    redop="sum",
    root=0,
    in_place=True,
)
