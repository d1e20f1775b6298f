"""all_reduce, in place: S is the size of every rank's array."""

from bench.harness import Case, values


def _prepare(rank, size, count):
    x = values(rank, count)
    return x, x, sum(values(r, count) for r in range(size))


def _mpi(comm, x, out):
    from mpi4py import MPI

    comm.Allreduce(MPI.IN_PLACE, x)


def _gloo(dist, x, out):
    import torch

    dist.all_reduce(torch.from_numpy(x))


CASE = Case(
    "all_reduce", lambda n: 2 * (n - 1) / n, "sum", _prepare, lambda comm, x, out: comm.all_reduce(x), _mpi, _gloo
)
