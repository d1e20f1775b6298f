"""all_reduce, in place: S is the size of every rank's array."""

from bench.harness.case import Case, total, values


def _mpi(comm, x, out):
    from mpi4py import MPI

    comm.Allreduce(MPI.IN_PLACE, x)


CASE = Case(
    "all_reduce",
    bus_factor=lambda n: 2 * (n - 1) / n,
    moved=lambda n: 2 * n,
    data=lambda rank, size, count: (values(rank, count), total(size, count)),
    ours=lambda comm, x, out: comm.all_reduce(x),
    mpi=_mpi,
    gloo=lambda dist, x, out: dist.all_reduce(x),
    redop="sum",
    in_place=True,
)
