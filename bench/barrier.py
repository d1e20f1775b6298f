"""barrier: only the time counts; the bandwidth columns mean nothing here."""

import numpy as np

from bench.harness import Case


def _prepare(rank, size, count):
    nothing = np.zeros(count, np.float32)
    return nothing, nothing, nothing


CASE = Case(
    "barrier", lambda n: 0.0, "none", _prepare,
    lambda comm, x, out: comm.barrier(), lambda comm, x, out: comm.Barrier(), lambda dist, x, out: dist.barrier(),
)  # fmt: skip
