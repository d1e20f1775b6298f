"""A rank that runs every collective, and checks every array."""

import sys

import numpy as np

import collectives as cc

comm = cc.init(sys.argv[1], timeout=60)
rank, size = comm.rank, comm.size
for count in (0, 1, 13, 1000, 300_007):
    base = np.arange(count) % 11
    total = base * size + size * (size - 1) // 2
    for dtype in (np.int64, np.float32, np.float64):
        x = (base + rank).astype(dtype)
        assert np.array_equal(comm.all_reduce(x), total)
        blocks = np.stack([base + rank + r for r in range(size)]).astype(dtype)
        assert np.array_equal(comm.reduce_scatter(blocks).reshape(-1), total + size * rank)
        assert np.array_equal(comm.all_gather((base + rank).astype(dtype)), [base + r for r in range(size)])
        assert np.array_equal(comm.all_to_all(blocks), [base + r + rank for r in range(size)])
        x = (base + rank).astype(dtype)
        assert np.array_equal(comm.broadcast(x, size - 1), base + size - 1)
        root = count % size
        reduced = comm.reduce((base + rank).astype(dtype), root)
        assert reduced is None if rank != root else np.array_equal(reduced, total)
        gathered = comm.gather((base + rank).astype(dtype), root)
        assert gathered is None if rank != root else np.array_equal(gathered, [base + r for r in range(size)])
        out = np.empty(count, dtype)
        comm.scatter(blocks if rank == root else None, root, out)
        assert np.array_equal(out, base + root + rank)
        assert np.array_equal(comm.scan((base + rank).astype(dtype)), base * (rank + 1) + rank * (rank + 1) // 2)
        # Uneven blocks, of which the middle one is empty: rank r has or gets `counts[r]` elements.
        counts = [count * r // size if r != size // 2 else 0 for r in range(size)]
        pieces = [np.arange(counts[r]) % 11 for r in range(size)]
        mine = (pieces[rank] + rank).astype(dtype)
        everyone = np.concatenate([pieces[r] + r for r in range(size)])
        assert np.array_equal(comm.all_gather_v(mine, counts), everyone)
        for_all = np.concatenate([piece + rank for piece in pieces]).astype(dtype)
        summed = pieces[rank] * size + size * (size - 1) // 2
        assert np.array_equal(comm.reduce_scatter_v(for_all, counts), summed)
        found = comm.all_to_all_v(for_all, counts, [counts[rank]] * size)
        assert np.array_equal(found, np.concatenate([pieces[rank] + r for r in range(size)]))
        comm.barrier()
inner = comm.split(rank % 2)
assert inner.all_reduce(np.ones(3))[0] == inner.size
if size > 1:
    out = np.zeros(5)
    comm.sendrecv(np.full(5, float(rank)), (rank + 1) % size, out, (rank - 1) % size, tag=7)
    assert (out == (rank - 1) % size).all()
again = cc.init(sys.argv[1], timeout=60)
assert again.all_reduce(np.ones(2))[0] == size
print(f"rank {rank} is right over {sys.argv[1]}")
