"""all_to_all: S is the size of every rank's array, one block of which goes to each rank."""

import numpy as np

from bench.harness import Case, values


def _prepare(rank, size, count):
    block = count // size
    parts = [values(r, count)[rank * block : (rank + 1) * block] for r in range(size)]
    return values(rank, count), np.zeros(count, np.float32), np.concatenate(parts)


CASE = Case(
    "all_to_all", lambda n: (n - 1) / n, "none", _prepare,
    lambda comm, x, out: comm.all_to_all(x, out), lambda comm, x, out: comm.Alltoall(x, out),
)  # fmt: skip
