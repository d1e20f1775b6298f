"""broadcast from rank 0: S is the size of the array."""

import numpy as np

from bench.harness import Case, values


def _prepare(rank, size, count):
    x = values(0, count) if rank == 0 else np.zeros(count, np.float32)
    return x, x, values(0, count)


def _gloo(dist, x, out):
    import torch

    dist.broadcast(torch.from_numpy(x), 0)


CASE = Case(
    "broadcast",
    lambda n: 1.0,
    "none",
    _prepare,
    lambda comm, x, out: comm.broadcast(x),
    lambda comm, x, out: comm.Bcast(x),
    _gloo,
)
