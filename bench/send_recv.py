"""send/recv round the ring: every rank sends S bytes to the next and receives from the one before."""

import numpy as np

from bench.harness import Case, values


def _prepare(rank, size, count):
    return values(rank, count), np.zeros(count, np.float32), values((rank - 1) % size, count)


def _ours(comm, x, out):
    comm.sendrecv(x, (comm.rank + 1) % comm.size, out, (comm.rank - 1) % comm.size)


def _mpi(comm, x, out):
    rank, size = comm.Get_rank(), comm.Get_size()
    comm.Sendrecv(x, (rank + 1) % size, 0, out, (rank - 1) % size, 0)


CASE = Case("send_recv", lambda n: 1.0, "none", _prepare, _ours, _mpi)
