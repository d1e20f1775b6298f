"""A rank that runs every registered algorithm by the native engine and by the reference engine: the same bits, the same stats.

Argument: a seed. Both engines run in this process, over shared memory and over sockets.
"""

import os
import sys

import numpy as np

import collectives as cc
from collectives.algorithms import registered
from collectives.spec import COLLECTIVES
from kernels import dtypes, supported

SEED = int(sys.argv[1])
SLICE = 4096
COUNTS = (0, 1, 7, 60, 1021, 5000, 40_000)
CASES = 14
"""Calls of each algorithm; the counts take turns."""


def content(rng, dtype, count):
    if dtypes.kind_of(dtype) in "uib":
        return rng.integers(0, 2 if dtypes.kind_of(dtype) == "b" else 100, count).astype(dtype)
    values = rng.standard_normal(count) + (1j * rng.standard_normal(count) if dtypes.kind_of(dtype) == "c" else 0)
    return values.astype(dtype)


def array(kind, values):
    """The values in memory of a kind: one that the engine takes as it is, at an odd address, or strided."""
    if kind == 0:
        return values.copy()
    memory = np.zeros(2 * values.nbytes + 1, np.uint8)
    place = memory[1 : values.nbytes + 1].view(values.dtype) if kind == 1 else memory[:-1].view(values.dtype)[::2]
    place[:] = values
    return place


def call(comm, entry, dtype, op, root, mine, kind, in_place):
    """Make the call with arrays of its own; returns every array that it may have written to."""
    name, size, me = entry.collective, comm.size, comm.rank
    spec, x = COLLECTIVES[name], array(kind, mine)
    inputs, outputs = max(spec.input_blocks(size, me, root), 1), spec.output_blocks(size, me, root)
    options = {"async_op": True} if kind == 1 else {}
    if name == "barrier":
        comm.barrier()
        return []
    if name in ("all_reduce", "scan"):
        result = getattr(comm, name)(x, op, **options)
    elif name == "broadcast":
        result = comm.broadcast(x, root, **options)
    else:
        out = array(kind, np.zeros(mine.size // inputs * outputs, dtype)) if outputs else None
        shared = spec.in_place(size, me, root) if outputs and in_place and kind != 2 else None
        if shared is not None and name != "all_to_all":
            # The smaller array is a block of the larger one.
            block = mine.size // inputs
            if out.size < x.size:
                out = x[shared[1] * block : (shared[1] + 1) * block]
            else:
                out[shared[0] * block : shared[0] * block + x.size] = x
                x = out[shared[0] * block : shared[0] * block + x.size]
        elif shared is not None:
            out = x
        if name in ("reduce", "reduce_scatter"):
            result = (
                comm.reduce(x, root, op, out, **options)
                if name == "reduce"
                else comm.reduce_scatter(x, out, op, **options)
            )
        elif name in ("gather", "scatter"):
            given = None if name == "scatter" and me != root else x
            result = getattr(comm, name)(given, root, out, **options)
        else:
            result = getattr(comm, name)(x, out, **options)
    result = result.wait() if options else result
    return [result, x]


def call_uneven(comm, entry, dtype, op, counts, mine, kind):
    name, me = entry.collective, comm.rank
    x = array(kind, mine)
    if name == "all_gather":
        return [comm.all_gather_v(x, counts[0])]
    if name == "reduce_scatter":
        return [comm.reduce_scatter_v(x, counts[0], op=op)]
    return [comm.all_to_all_v(x, counts[me], [row[me] for row in counts])]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        (a is None and b is None)
        or (a is not None and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
        for a, b in zip(ours, theirs, strict=True)
    )


def compare(entry, native, reference, number):
    rng = np.random.default_rng([SEED, number])
    spec, size, me = COLLECTIVES[entry.collective], native.size, native.rank
    even = entry.schedule(size).even
    pairs = [
        (dtype, op)
        for dtype in dtypes.DTYPES
        for op in (cc.ReduceOp if spec.reduces else [None])
        if op is None or (supported(op, dtype) and (dtypes.kind_of(dtype), op) != ("c", cc.ReduceOp.PROD))
    ]
    for case in range(CASES):
        dtype, op = pairs[rng.integers(len(pairs))]
        count, root, kind = (
            COUNTS[case % len(COUNTS)],
            int(rng.integers(size)) if spec.rooted else 0,
            int(rng.integers(3)),
        )
        in_place, own = bool(rng.integers(2)), np.random.default_rng([SEED, number, case, me])
        mine = content(own, dtype, count * max(spec.input_blocks(size, me, root), 1))
        # Twice: the first call makes the plan, the second finds it.
        for _ in range(2):
            results = [call(comm, entry, dtype, op, root, mine, kind, in_place) for comm in (native, reference)]
            assert same(*results), (entry.collective, entry.name, dtype, op, count, root, kind, in_place)
        if entry.collective in ("all_gather", "reduce_scatter", "all_to_all") and not even:
            counts = rng.integers(0, count + 1, (size, size)) * rng.integers(0, 2, (size, size))
            counts = [[int(many) for many in row] for row in counts]
            many = (
                counts[0][me]
                if entry.collective == "all_gather"
                else sum(counts[me if entry.collective == "all_to_all" else 0])
            )
            mine = content(own, dtype, many)
            results = [call_uneven(comm, entry, dtype, op, counts, mine, kind) for comm in (native, reference)]
            assert same(*results), (entry.collective, entry.name, dtype, op, counts, kind)


os.environ["COLLECTIVES_SLICE_BYTES"] = str(SLICE)
rounds = max(len(registered(collective)) for collective in COLLECTIVES)
made = 0
for turn in range(rounds):
    entries = [registered(collective)[turn : turn + 1] for collective in COLLECTIVES]
    forced = {entry.collective: entry.name for found in entries for entry in found}
    with (
        cc.init("shm", timeout=60, algorithms=forced) as native,
        cc.init("tcp", timeout=60, algorithms=forced) as reference,
    ):
        for found in entries:
            for entry in found:
                compare(entry, native, reference, made)
                made += 1
        ours, theirs = native.stats, reference.stats
        for collective in forced:
            assert ours.calls[collective] == theirs.calls[collective]
            assert ours.sent[collective] == theirs.sent[collective], (
                collective,
                ours.sent[collective],
                theirs.sent[collective],
            )
            assert ours.received[collective] == theirs.received[collective], collective
            assert collective not in native._ledgers, "this ran through Python"
assert made == len(registered())
print(f"rank {native.rank}: {made} algorithms agree")
