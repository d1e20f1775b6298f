"""reduce_scatter: S is the size of every rank's input, of which it keeps one reduced block."""

from bench.harness.case import Case, block, total, values


def _gloo(dist, x, out):
    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(
        out, x
    )  # the name in newer versions, or the older one


CASE = Case(
    "reduce_scatter",
    bus_factor=lambda n: (n - 1) / n,
    moved=lambda n: n + 1,
    data=lambda rank, size, count: (values(rank, count), block(total(size, count), rank, size)),
    ours=lambda comm, x, out: comm.reduce_scatter(x, out),
    mpi=lambda comm, x, out: comm.Reduce_scatter_block(x, out),
    gloo=_gloo,
    redop="sum",
    blocks=True,
)
