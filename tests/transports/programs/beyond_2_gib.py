"""Two ranks of which one sends the other more than 2³¹ bytes, as one message and in slices; every block is different."""

import os
import sys

import numpy as np

import collectives as cc

COUNT, BLOCK = 2**31 + 3, 1 << 24
template = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8)
blocks = [slice(start, min(start + BLOCK, COUNT)) for start in range(0, COUNT, BLOCK)]
x = np.empty(COUNT, np.uint8)

for slice_bytes in (1 << 33, 1 << 20):
    os.environ["COLLECTIVES_SLICE_BYTES"] = str(slice_bytes)
    with cc.init(sys.argv[1], timeout=100) as comm:
        if comm.rank == 0:
            for number, block in enumerate(blocks):
                x[block] = template[: block.stop - block.start] + np.uint8(number)
            comm.send(x, 1)
        else:
            x[:] = 0
            assert comm.recv(x, 0) is x
            for number, block in enumerate(blocks):
                assert np.array_equal(x[block], template[: block.stop - block.start] + np.uint8(number)), number
        comm.barrier()
        assert comm.stats.sent["send/recv"] == ({1: COUNT} if comm.rank == 0 else {})
        print(f"rank {comm.rank} is right over {sys.argv[1]}")
