"""scan, the inclusive prefix sum over the ranks, in place: S is the size of every rank's array. Gloo has none."""

from bench.harness.case import Case, total, values


def _mpi(comm, x, out):
    from mpi4py import MPI

    comm.Scan(MPI.IN_PLACE, x)


CASE = Case(
    "scan",
    bus_factor=lambda n: 1.0,
    moved=lambda n: 2 * n - 1,
    data=lambda rank, size, count: (values(rank, count), total(rank + 1, count)),
    ours=lambda comm, x, out: comm.scan(x),
    mpi=_mpi,
    redop="sum",
    in_place=True,
)
