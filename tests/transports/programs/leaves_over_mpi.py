"""Three ranks that leave with messages under way; every one must be able to end all the same."""

import numpy as np

import collectives as cc
import transports.mpi
from transports.base import NO_LABEL, Ledger
from transports.errors import LabelMismatch

BIG = 3_000_000
transports.mpi._CLOSE_SECONDS = 0.01
comm = cc.init("mpi", timeout=20)
transport, rank = comm._job.transport, comm.rank


def complete(request):
    while not request.done:
        transport.progress(20)


# A payload that does not fit its receive is taken all the same, and messages after it arrive.
if rank == 0:
    requests = [
        transport.send(1, 1, b"\1" * 24, memoryview(bytes(BIG)), Ledger()),
        transport.send(1, 2, NO_LABEL, memoryview(b"after"), Ledger()),
    ]
    for request in requests:
        complete(request)
elif rank == 1:
    transport.recv(0, 1, NO_LABEL, memoryview(bytearray(BIG)), Ledger())
    after = bytearray(5)
    receiving = transport.recv(0, 2, NO_LABEL, memoryview(after), Ledger())
    mismatches = 0
    while not receiving.done:
        try:
            transport.progress(20)
        except LabelMismatch:
            mismatches += 1
    assert (mismatches, after) == (1, b"after")
comm.barrier()

# Rank 0 leaves at once with a message on its way; rank 1 takes that one, but none of rank 2, and leaves.
if rank == 0:
    comm.send(np.ones(BIG, np.uint8), 1, async_op=True)
elif rank == 1:
    assert comm.recv(np.zeros(BIG, np.uint8), 0).all()
    transport._finish_receives = lambda: False
    comm.send(np.zeros(1), 2)
else:
    comm.recv(np.zeros(1), 1)
    try:
        comm.send(np.ones(BIG, np.uint8), 1)
    except cc.PeerLost as error:
        assert "rank 1 left normally" in str(error)
    else:
        raise AssertionError("a message that nobody took was sent")
print(f"rank {rank} leaves")
