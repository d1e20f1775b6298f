"""Two ranks of which number 1 moves to a network namespace of its own once it has met the other; over transport `argv[1]`."""

import ctypes
import sys

import numpy as np

import collectives as cc
import transports.connect

CLONE_NEWNET = 0x40000000
original = transports.connect.connect_shm


def moved(rank, *rest):
    if rank == 1:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            raise PermissionError(ctypes.get_errno(), "unshare is not permitted")
    return original(rank, *rest)


transports.connect.connect_shm = moved
try:
    comm = cc.init(sys.argv[1], timeout=30)
except cc.TransportUnavailable as error:
    print(f"refused: {error}")
else:
    assert comm.all_reduce(np.ones(1000))[0] == 2
    print(f"right over {comm._job.transport.name}")
