"""all_gather: S is the size of the gathered array, of which every rank gives one block."""

import numpy as np

from bench.harness import Case, values


def _prepare(rank, size, count):
    block = count // size
    return values(rank, block), np.zeros(count, np.float32), np.concatenate([values(r, block) for r in range(size)])


def _gloo(dist, x, out):
    import torch

    dist.all_gather_into_tensor(torch.from_numpy(out), torch.from_numpy(x))


CASE = Case(
    "all_gather", lambda n: (n - 1) / n, "none", _prepare,
    lambda comm, x, out: comm.all_gather(x, out), lambda comm, x, out: comm.Allgather(x, out), _gloo,
)  # fmt: skip
