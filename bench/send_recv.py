"""send/recv round the ring: every rank sends S bytes to the next and receives from the one before."""

from bench.harness.case import Case, values


def _ours(comm, x, out):
    comm.sendrecv(x, (comm.rank + 1) % comm.size, out, (comm.rank - 1) % comm.size)


def _mpi(comm, x, out):
    comm.Sendrecv(x, (comm.rank + 1) % comm.size, 0, out, (comm.rank - 1) % comm.size, 0)


def _gloo(dist, x, out):
    rank, size = dist.get_rank(), dist.get_world_size()
    receiving = dist.irecv(out, (rank - 1) % size)
    dist.isend(x, (rank + 1) % size).wait()
    receiving.wait()


CASE = Case(
    "send_recv",
    bus_factor=lambda n: 1.0,
    moved=lambda n: 2 * n,
    data=lambda rank, size, count: (values(rank, count), values((rank - 1) % size, count)),
    ours=_ours,
    mpi=_mpi,
    gloo=_gloo,
)
