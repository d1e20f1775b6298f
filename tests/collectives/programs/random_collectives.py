"""A rank that runs random collectives on random communicators, and compares every bit with the specification.

Arguments: transport, seed, number of rounds. What is called comes from one seed, so all ranks agree; what memory the arrays
lie in, whether a call waits, and in which order calls on different communicators start is up to each rank.
"""

import itertools
import sys

import numpy as np

import collectives as cc
from collectives.spec import COLLECTIVES
from kernels import dtypes, numpy_backend, supported

TRANSPORT, SEED, ROUNDS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
COUNTS = (0, 1, 2, 3, 17, 255, 1000, 1023, 2048, 2049, 8191, 20_011, 65_536, 100_003, 400_009)


def content(dtype, count, *key):
    """Values of any dtype, the same for everyone who asks with the same key."""
    rng = np.random.default_rng([SEED, *key])
    kind = dtypes.kind_of(dtype)
    if kind in "uib":
        return rng.integers(0, 2 if kind == "b" else 100, count).astype(dtype)
    values = rng.standard_normal(count)
    return (values + 1j * rng.standard_normal(count)).astype(dtype) if kind == "c" else values.astype(dtype)


def expected(name, members, me, root, dtype, op, counts, key):
    """What the specification says that rank `me` holds: flat."""
    row, size = COLLECTIVES[name], len(members)
    uniform = len(counts) == 1
    blocks = []
    for block in range(row.output_blocks(size, me, root)):
        parts = []
        for source, index in row.result(size, me, root, block):
            sizes = [counts[0]] * size if uniform else counts
            many = row.input_blocks(size, source, root) > 1
            whole = content(dtype, sum(sizes) if many else sizes[source if not uniform else 0], *key, source)
            parts.append(whole[sum(sizes[:index]) : sum(sizes[: index + 1])] if many else whole)
        if row.reduces:
            out = np.empty_like(parts[0])
            numpy_backend.reduce_many(op, parts, out)
            if op is cc.ReduceOp.AVG:
                numpy_backend.scale(out, 1 / size)
            blocks.append(out)
        else:
            blocks += parts
    return np.concatenate(blocks) if blocks else np.empty(0, dtype)


class Round:
    """One collective of one round on one communicator."""

    def __init__(self, comm, members, number, shared, private):
        self.comm, self.me, size = comm, comm.rank, comm.size
        key = (number, members[0])
        self.name = str(shared.choice([n for n in COLLECTIVES if n != "barrier"]))
        row = COLLECTIVES[self.name]
        self.root = int(shared.integers(size)) if row.rooted else 0
        # Complex products have no native kernel: the reference engine folds them in an order of its own.
        pairs = [
            (dtype, op)
            for dtype, op in itertools.product(dtypes.DTYPES, cc.ReduceOp)
            if supported(op, dtype) and (dtypes.kind_of(dtype), op) != ("c", cc.ReduceOp.PROD)
        ]
        dtype, op = pairs[shared.integers(len(pairs))]
        self.op = op if row.reduces else None
        uneven = self.name in ("all_gather", "reduce_scatter") and shared.random() < 0.3
        count = int(shared.choice(COUNTS)) if shared.random() < 0.8 else int(shared.integers(3000))
        if row.output_blocks(size, 0, 0) > 1 or row.input_blocks(size, self.root, self.root) > 1:
            count //= size
        self.counts = [int(c) for c in shared.integers(0, count + 1, size)] if uneven else [count]
        many = row.input_blocks(size, self.me, self.root) > 1
        sizes = self.counts if uneven else self.counts * size
        mine = content(dtype, sum(sizes) if many else sizes[self.me], *key, self.me)
        self.want = expected(self.name, members, self.me, self.root, dtype, self.op, self.counts, key)
        self.x, self.out = self.memory(mine.size, dtype, private), self.memory(self.want.size, dtype, private)
        self.x[:] = mine
        self.mine = mine
        self.asynchronous = bool(private.random() < 0.4)
        plannable = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all")
        self.planned = self.name in plannable and not uneven and bool(shared.random() < 0.2)

    def memory(self, count, dtype, private):
        kind = private.integers(3)
        if kind == 0:
            return self.comm.empty(count, dtype)
        return np.empty(count, dtype) if kind == 1 else np.empty(2 * count, dtype)[::2]

    def plan(self):
        """Call it twice by a plan, and once more as it would be otherwise."""
        arguments = {
            "all_reduce": (self.x, self.op),
            "broadcast": (self.x, self.root),
            "reduce_scatter": (self.x, self.out, self.op),
        }.get(self.name, (self.x, self.out))
        planned = getattr(self.comm, f"plan_{self.name}")(*arguments)
        for call in (planned, lambda: [planned.start(), planned.wait()][1]):
            self.check(call(), -1)
            self.x[:] = self.mine

    def start(self):
        comm, options = self.comm, {"async_op": True} if self.asynchronous else {}
        x, out, op, root = self.x, self.out, self.op, self.root
        if self.name in ("all_reduce", "scan"):
            return getattr(comm, self.name)(x, op, **options), x
        if self.name == "broadcast":
            return comm.broadcast(x, root, **options), x
        if self.name == "reduce":
            return comm.reduce(x, root, op, out if self.me == root else None, **options), out
        if self.name == "gather":
            return comm.gather(x, root, out if self.me == root else None, **options), out
        if self.name == "scatter":
            return comm.scatter(x if self.me == root else None, root, out, **options), out
        if len(self.counts) > 1:
            if self.name == "all_gather":
                return comm.all_gather_v(x, self.counts, out, **options), out
            return comm.reduce_scatter_v(x, self.counts, out, op, **options), out
        if self.name == "reduce_scatter":
            return comm.reduce_scatter(x, out, op, **options), out
        return getattr(comm, self.name)(x, out, **options), out

    def check(self, result, number):
        got = np.ascontiguousarray(result).reshape(-1)[: self.want.size]
        if got.tobytes() != self.want.tobytes():
            wrong = np.flatnonzero(got.view(np.uint8) != self.want.view(np.uint8))
            raise SystemExit(
                f"rank {self.me} of {self.comm.size}, round {number}: {self.name} {self.want.dtype} {self.op} {self.counts} root {self.root}: "
                f"{wrong.size} bytes of {self.want.nbytes} differ, from {wrong[0]} to {wrong[-1]}"
            )


world = cc.init(TRANSPORT, timeout=60)
groups = [(world, list(range(world.size)))]
rng = np.random.default_rng(SEED)
for colors in (rng.integers(0, 2, world.size), np.zeros(world.size, int)):
    part = world.split(int(colors[world.rank]), key=-world.rank)
    groups.append((part, [rank for rank in reversed(range(world.size)) if colors[rank] == colors[world.rank]]))
own = np.random.default_rng([SEED, world.rank])
for number in range(ROUNDS):
    chosen = [groups[i] for i in rng.choice(len(groups), int(rng.integers(1, len(groups) + 1)), replace=False)]
    seeds = rng.integers(0, 2**31, len(chosen))
    rounds = [
        Round(comm, members, number * 8 + place, np.random.default_rng([seed, members[0]]), own)
        for place, ((comm, members), seed) in enumerate(zip(chosen, seeds, strict=True))
    ]
    if len(rounds) > 1:
        # Started in an order of this rank's own, they must not wait for each other.
        for item in rounds:
            item.asynchronous = True
    for item in rounds:
        if item.planned:
            item.plan()
    started = [(rounds[i], *rounds[i].start()) for i in own.permutation(len(rounds))]
    for i in own.permutation(len(started)):
        item, work, result = started[i]
        if item.asynchronous:
            work.wait()
        item.check(result, number)
    if number % 16 == 0:
        peer = (world.rank + 1) % world.size
        size, tag = int(rng.choice(COUNTS)), int(rng.integers(5))
        if world.size > 1:
            data, into = content(np.dtype(np.int32), size, number, world.rank), np.empty(size, np.int32)
            previous = (world.rank - 1) % world.size
            later = world.recv(np.empty(3), previous, tag + 100, async_op=True)
            world.sendrecv(data, peer, into, previous, tag)
            world.send(np.full(3, float(number)), peer, tag + 100)
            assert (later.wait() == number).all()
            assert np.array_equal(into, content(np.dtype(np.int32), size, number, previous))
print(f"rank {world.rank}: {ROUNDS} rounds over {TRANSPORT} agree")
