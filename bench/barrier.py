"""barrier: only the time counts; the bandwidth columns mean nothing here."""

from bench.harness.case import Case, nothing

CASE = Case(
    "barrier",
    bus_factor=lambda n: 0.0,
    moved=lambda n: 0.0,
    data=lambda rank, size, count: (nothing(), nothing()),
    ours=lambda comm, x, out: comm.barrier(),
    mpi=lambda comm, x, out: comm.Barrier(),
    gloo=lambda dist, x, out: dist.barrier(),
)
