"""reduce_scatter: S is the size of every rank's input, of which it keeps one reduced block."""

import numpy as np

from bench.harness import Case, values


def _prepare(rank, size, count):
    total = sum(values(r, count) for r in range(size))
    block = count // size
    return values(rank, count), np.zeros(block, np.float32), total[rank * block : (rank + 1) * block]


def _gloo(dist, x, out):
    import torch

    dist.reduce_scatter_tensor(torch.from_numpy(out), torch.from_numpy(x))


CASE = Case(
    "reduce_scatter", lambda n: (n - 1) / n, "sum", _prepare,
    lambda comm, x, out: comm.reduce_scatter(x, out), lambda comm, x, out: comm.Reduce_scatter_block(x, out), _gloo,
)  # fmt: skip
