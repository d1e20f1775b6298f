"""broadcast from rank 0, in place: S is the size of the array."""

from bench.harness.case import Case, values

CASE = Case(
    "broadcast",
    bus_factor=lambda n: 1.0,
    moved=lambda n: n,
    data=lambda rank, size, count: (values(0, count) * (rank == 0), values(0, count)),
    ours=lambda comm, x, out: comm.broadcast(x),
    mpi=lambda comm, x, out: comm.Bcast(x),
    gloo=lambda dist, x, out: dist.broadcast(x, 0),
    root=0,
    in_place=True,
)
