"""Every collective on threads, against what its row in the spec says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import collectives as cc
import kernels
from collectives.algorithms import registered
from collectives.spec import COLLECTIVES
from collectives.testing import run_ranks
from kernels import dtypes

SLICE = 64
ENTRIES = registered()
UNEVEN = [
    entry
    for entry in ENTRIES
    if entry.collective in ("all_gather", "reduce_scatter", "all_to_all") and not entry.schedule(2).even
]
NAMES = [f"{entry.collective}-{entry.name}" for entry in ENTRIES]
COUNTS = st.sampled_from([0, 1, 2, 3, 5, 7, 13, 31, 64, 97, 211])
MOVING = st.sampled_from(dtypes.DTYPES)
REDUCING = st.sampled_from(
    [(op, dtype) for op in cc.ReduceOp for dtype in dtypes.DTYPES if kernels.supported(op, dtype)]
)


def block(rank, index, count, dtype):
    """Small whole numbers, exact in every dtype and every order of reduction."""
    values = (np.arange(count) * 5 + rank * 3 + index) % 3
    return (values > 0 if dtype.kind == "b" else values).astype(dtype)


def expected(collective, size, rank, root, index, count, dtype, op):
    """Output block `index`, by the spec."""
    parts = [block(source, b, count, dtype) for source, b in COLLECTIVES[collective].result(size, rank, root, index)]
    total = parts[0].copy()
    for part in parts[1:]:
        kernels.reduce(cc.ReduceOp.SUM if op is cc.ReduceOp.AVG else op, total, part, total)
    if op is cc.ReduceOp.AVG:
        kernels.scale(total, 1 / size)
    return total


def same(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def call(comm, collective, op, root, x):
    """The collective on a rank's input blocks (None: it has none); the blocks that it gets, one under the other."""
    if collective == "barrier":
        return comm.barrier()
    if collective in ("all_reduce", "scan"):
        return getattr(comm, collective)(x[0].copy(), op)[None]
    if collective == "broadcast":
        return comm.broadcast(x[0].copy(), root)[None]
    if collective == "scatter":
        out = np.empty_like(x[0])
        return comm.scatter(x if comm.rank == root else None, root, out)[None]
    if collective == "reduce_scatter":
        return comm.reduce_scatter(x, op=op)
    if collective == "all_to_all":
        return comm.all_to_all(x)
    out = comm.reduce(x[0], root, op) if collective == "reduce" else None
    if collective == "reduce":
        return out if out is None else out[None]
    return comm.gather(x[0], root) if collective == "gather" else comm.all_gather(x[0])


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
@given(size=st.integers(1, 9), count=COUNTS, pair=REDUCING, moving=MOVING, root=st.integers(0, 8), data=st.data())
def test_every_algorithm(entry, size, count, pair, moving, root, data):
    """Each one of the registry, on real buffers, whether or not it would be chosen."""
    spec = COLLECTIVES[entry.collective]
    op, dtype = pair if spec.reduces else (None, moving)
    op = cc.ReduceOp.SUM if op is cc.ReduceOp.AVG and entry.collective == "scan" else op
    op, dtype = (op, dtype) if op is None or kernels.supported(op, dtype) else (cc.ReduceOp.MAX, np.dtype(np.int8))
    root = root % size if spec.rooted else 0
    slice_bytes = data.draw(st.sampled_from([16, SLICE, 4096]))

    def rank(comm):
        me = comm.rank
        blocks = max(1, spec.input_blocks(size, me, root))
        x = np.stack([block(me, b, count, dtype) for b in range(blocks)])
        if entry.collective == "scatter" and me != root:
            x = np.stack([block(me, 0, count, dtype)])
        before = x.copy()
        result = call(comm, entry.collective, op, root, x)
        assert same(x, before)
        if entry.collective == "barrier" or not spec.output_blocks(size, me, root):
            assert result is None
            return
        wanted = [
            expected(entry.collective, size, me, root, b, count, dtype, op)
            for b in range(spec.output_blocks(size, me, root))
        ]
        assert same(result, np.stack(wanted))

    run_ranks(size, rank, slice_bytes=slice_bytes, algorithms={entry.collective: entry.name})


@pytest.mark.slow
@pytest.mark.parametrize("entry", UNEVEN, ids=lambda entry: f"{entry.collective}-{entry.name}")
@given(counts=st.integers(1, 6).flatmap(lambda size: st.lists(st.integers(0, 40), min_size=size, max_size=size)))
def test_every_algorithm_with_uneven_blocks(entry, counts):
    uneven_blocks(counts, {entry.collective: entry.name})


@given(st.integers(1, 9), COUNTS, REDUCING, st.integers(0, 8))
def test_reductions(size, count, pair, root):
    op, dtype = pair
    root %= size

    def rank(comm):
        me = comm.rank
        x = block(me, 0, count, dtype)
        assert comm.all_reduce(x, op) is x
        assert same(x, expected("all_reduce", size, me, 0, 0, count, dtype, op))
        x = block(me, 0, count, dtype)
        out = comm.reduce(x, root, op)
        assert (out is None) == (me != root)
        assert out is None or same(out, expected("reduce", size, me, root, 0, count, dtype, op))
        assert same(x, block(me, 0, count, dtype))
        x = np.concatenate([block(me, b, count, dtype) for b in range(size)])
        assert same(comm.reduce_scatter(x, op=op), expected("reduce_scatter", size, me, 0, 0, count, dtype, op))
        assert same(x, np.concatenate([block(me, b, count, dtype) for b in range(size)]))
        if op is not cc.ReduceOp.AVG:
            x = block(me, 0, count, dtype)
            assert same(comm.scan(x, op), expected("scan", size, me, 0, 0, count, dtype, op))

    run_ranks(size, rank, slice_bytes=SLICE)


@given(st.integers(1, 9), COUNTS, MOVING, st.integers(0, 8))
def test_movements(size, count, dtype, root):
    root %= size

    def rank(comm):
        me = comm.rank
        mine = block(me, 0, count, dtype)
        blocks = np.stack([block(me, b, count, dtype) for b in range(size)])
        everyone = np.stack([block(r, 0, count, dtype) for r in range(size)])
        assert same(comm.all_gather(mine), everyone)
        gathered = comm.gather(mine, root)
        assert (gathered is None) if me != root else same(gathered, everyone)
        x = mine if me == root else np.zeros_like(mine)
        assert same(comm.broadcast(x, root), block(root, 0, count, dtype))
        out = np.empty(count, dtype)
        comm.scatter(blocks if me == root else None, root, out)
        assert same(out, block(root, me, count, dtype))
        assert same(comm.all_to_all(blocks), np.stack([block(r, me, count, dtype) for r in range(size)]))
        comm.barrier()

    run_ranks(size, rank, slice_bytes=SLICE)


PAIRS = [(op, dtype) for op in cc.ReduceOp for dtype in dtypes.DTYPES if kernels.supported(op, dtype)]
SIZES_OF_ARRAYS = [0, 1, 2, 7, 13, 64, 641]  # the last is beyond one slice, shared among nine ranks as well
UFUNCS = {
    cc.ReduceOp.SUM: np.add, cc.ReduceOp.AVG: np.add, cc.ReduceOp.PROD: np.multiply, cc.ReduceOp.MIN: np.minimum,
    cc.ReduceOp.MAX: np.maximum, cc.ReduceOp.BAND: np.bitwise_and, cc.ReduceOp.BOR: np.bitwise_or,
    cc.ReduceOp.BXOR: np.bitwise_xor,
}  # fmt: skip


def by_numpy(parts, op):
    """The reduction of arrays; whole numbers this small are exact in every dtype, other than their mean."""
    total = parts[0]
    for part in parts[1:]:
        total = UFUNCS[op](total, part, dtype=total.dtype)
    return (total.astype(np.complex128) / len(parts)) if op is cc.ReduceOp.AVG else total


def agree(found, expected, op):
    if op is not cc.ReduceOp.AVG:
        return same(found, expected)
    precision = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(found.dtype.name, 1e-6)
    return np.allclose(found.astype(np.complex128), expected, rtol=precision, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("size", range(1, 10))
def test_every_operation_on_every_dtype_against_numpy(size):
    def rank(comm):
        me = comm.rank
        for number, (op, dtype) in enumerate(PAIRS):
            count = SIZES_OF_ARRAYS[(number + size) % len(SIZES_OF_ARRAYS)]
            root, what = number % size, (op, dtype, count)
            columns = [[block(r, b, count, dtype) for r in range(size)] for b in range(size)]
            assert agree(comm.all_reduce(columns[0][me].copy(), op), by_numpy(columns[0], op), op), what
            mine = np.stack([columns[b][me] for b in range(size)])
            assert agree(comm.reduce_scatter(mine, op=op).reshape(-1), by_numpy(columns[me], op), op), what
            reduced = comm.reduce(columns[0][me], root, op)
            assert reduced is None if me != root else agree(reduced, by_numpy(columns[0], op), op), what
            if op is not cc.ReduceOp.AVG:
                assert same(comm.scan(columns[0][me].copy(), op), by_numpy(columns[0][: me + 1], op)), what

    run_ranks(size, rank, slice_bytes=SLICE)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("size", [2, 5, 9])
def test_rounded_sums_have_the_same_bits_on_all_ranks_and_again(size, dtype):
    inputs = [np.random.default_rng(r).standard_normal(641).astype(np.dtype(dtype)) for r in range(size)]
    rounds = [run_ranks(size, lambda comm: comm.all_reduce(inputs[comm.rank].copy()), slice_bytes=SLICE) for _ in "ab"]
    assert len({result.tobytes() for results in rounds for result in results}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("size", range(1, 10))
def test_every_dtype_is_moved_as_it_is(size):
    def rank(comm):
        me = comm.rank
        for number, dtype in enumerate(dtypes.DTYPES):
            count = SIZES_OF_ARRAYS[(number + size) % len(SIZES_OF_ARRAYS)]
            root = (number + 1) % size
            bits = np.random.default_rng(number).integers(0, 256, (size, size, count * dtype.itemsize), np.uint8)
            table = (bits % 2 if dtype.kind == "b" else bits).view(dtype)
            assert same(comm.all_gather(table[me, 0]), table[:, 0])
            assert same(comm.all_to_all(table[me]), table[:, me])
            x = table[me, 0].copy()
            assert same(comm.broadcast(x, root), table[root, 0])
            gathered = comm.gather(table[me, 0], root)
            assert gathered is None if me != root else same(gathered, table[:, 0])
            out = np.empty(count, dtype)
            assert same(comm.scatter(table[me] if me == root else None, root, out), table[root, me])
            comm.barrier()

    run_ranks(size, rank, slice_bytes=SLICE)


@pytest.mark.slow
@given(
    size=st.integers(1, 7),
    count=COUNTS,
    name=st.sampled_from(["float16", "bfloat16", "float32"]),
    slice_bytes=st.sampled_from([8, 64, 4096]),
    one_hop=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_deterministic_reductions_are_serial_in_rank_order(size, count, name, slice_bytes, one_hop, seed):
    """The bits are those of one loop over the ranks, whatever the algorithm, the size and the slices."""
    dtype = next(known for known in dtypes.DTYPES if known.name == name)
    generator = np.random.default_rng(seed)
    inputs = (
        generator.standard_normal((size, size * count)) * 10.0 ** generator.integers(-2, 3, size)[:, None]
    ).astype(dtype)

    def serial(parts):
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            total = total + part.astype(np.float32)
        return total.astype(dtype)

    def rank(comm):
        me, whole = comm.rank, serial(inputs)
        for group in (comm, comm.dup()):
            assert group.deterministic
            assert same(group.all_reduce(inputs[me].copy()), whole)
            assert same(group.reduce_scatter(inputs[me]), whole[me * count : (me + 1) * count])
            reduced = group.reduce(inputs[me], size - 1)
            assert reduced is None or same(reduced, whole)
            assert same(group.scan(inputs[me].copy()), serial(inputs[: me + 1]))

    forced = {"all_reduce": "one_hop"} if one_hop else None
    run_ranks(size, rank, slice_bytes=slice_bytes, algorithms=forced, deterministic=True)


@given(st.integers(1, 6).flatmap(lambda size: st.lists(st.integers(0, 40), min_size=size, max_size=size)))
def test_uneven_blocks(counts):
    uneven_blocks(counts, {})


def uneven_blocks(counts, algorithms):
    size = len(counts)

    def rank(comm):
        me, dtype = comm.rank, np.dtype(np.int32)
        mine = block(me, 0, counts[me], dtype)
        assert same(
            comm.all_gather_v(mine, counts), np.concatenate([block(r, 0, counts[r], dtype) for r in range(size)])
        )
        x = np.concatenate([block(me, b, counts[b], dtype) for b in range(size)])
        summed = sum(block(r, me, counts[me], dtype) for r in range(size)).astype(dtype)
        assert same(comm.reduce_scatter_v(x, counts), summed)
        out = comm.all_to_all_v(x, counts, [counts[me]] * size)
        assert same(out, np.concatenate([block(r, me, counts[me], dtype) for r in range(size)]))

    run_ranks(size, rank, slice_bytes=SLICE, algorithms=algorithms)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("count", [0, 5, 840])
def test_bytes_on_the_wire(size, count):
    """DESIGN's numbers: exactly 2(p−1)·N over all ranks for all_reduce, and 2(p−1)/p·N each where p divides N."""

    def rank(comm):
        comm.all_reduce(np.ones(count, np.float32))
        comm.all_gather(np.ones(count, np.float32))
        comm.broadcast(np.ones(count, np.float32))
        return {name: sum(peers.values()) for name, peers in comm.stats.sent.items()}

    sent = run_ranks(size, rank, algorithms={"all_reduce": "ring"})
    assert sum(s["all_reduce"] for s in sent) == 2 * (size - 1) * count * 4
    if count % size == 0:
        assert all(s["all_reduce"] * size == 2 * (size - 1) * count * 4 for s in sent)
    assert all(s["all_gather"] == (size - 1) * count * 4 for s in sent)
    assert sum(s["broadcast"] for s in sent) == (size - 1) * count * 4


def test_in_place_and_strided():
    def rank(comm):
        everyone = np.zeros((comm.size, 4))
        everyone[comm.rank] = comm.rank + 1
        comm.all_gather(everyone[comm.rank], everyone)
        assert everyone[:, 0].tolist() == [1, 2, 3]
        strided = np.ones((6, 4))[::2, 1::2]
        comm.all_reduce(strided)
        assert (strided == 3).all()
        x = np.arange(6.0)
        comm.all_to_all(x, x)
        assert x.reshape(3, 2)[:, 0].tolist() == [2.0 * comm.rank] * 3
        buffer = bytearray(b"\x01" * 5)
        comm.all_reduce(buffer)
        assert buffer == b"\x03" * 5

    run_ranks(3, rank)


def test_point_to_point_split_and_async():
    def rank(comm):
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        out = np.empty(1000)
        comm.sendrecv(np.full(1000, comm.rank), right, out.view(np.int64), left)
        assert (out.view(np.int64) == left).all()
        halves = comm.split(comm.rank % 2, -comm.rank)
        assert halves.size == 2
        assert halves.all_reduce(np.array([comm.rank]))[0] == (2 if comm.rank % 2 == 0 else 4)
        arrays = [np.full(50, float(k)) for k in range(5)]
        works = [comm.all_reduce(array, async_op=True) for array in arrays]
        for k, work in reversed(list(enumerate(works))):
            assert (work.wait() == 4.0 * k).all()
            assert work.done()
        assert comm.split(None if comm.rank == 0 else 1) is None or comm.rank > 0
        scaled = np.ones(3)
        comm.all_reduce(scaled, cc.ReduceOp.premultiplied_sum(comm.rank + 1))
        assert (scaled == 10).all()

    run_ranks(4, rank, slice_bytes=256)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda c: c.all_reduce(np.ones(5)), "float64 × 5"),
        (lambda c: c.all_reduce(np.ones(4, np.float32)), "float32 × 4"),
        (lambda c: c.all_reduce(np.ones(4), cc.ReduceOp.MAX), "MAX"),
        (lambda c: c.broadcast(np.ones(4), 1), "broadcast"),
        (lambda c: c.all_gather(np.ones(4)), "all_gather"),
    ],
)
def test_mismatch_names_both_calls(other, named):
    def rank(comm):
        other(comm) if comm.rank == 1 else comm.all_reduce(np.ones(4))

    with pytest.raises(cc.CollectiveMismatch) as caught:
        run_ranks(3, rank, timeout=20)
    assert named in str(caught.value)
    assert "all_reduce(float64 × 4, SUM)" in str(caught.value)


def test_timeout_names_who_is_missing():
    def rank(comm):
        if comm.rank != 2:
            comm.timeout = 0.3
            comm.all_reduce(np.ones(4))
        else:
            with pytest.raises(cc.CollectiveTimeout):
                comm.recv(np.ones(1), 0)

    with pytest.raises(cc.CollectiveTimeout, match="waiting for rank 2|rank 2"):
        run_ranks(3, rank, timeout=20)


def test_failed_communicator_refuses_calls():
    def rank(comm):
        if comm.rank == 0:
            comm.abort("enough")
        for _ in range(2):
            with pytest.raises(cc.Aborted, match="rank 0 called abort: enough"):
                comm.all_reduce(np.ones(2))

    run_ranks(2, rank)


def test_local_misuse():
    def rank(comm):
        frozen = np.ones(3)
        frozen.flags.writeable = False
        for error, message, call in [
            (TypeError, "x must be an array", lambda: comm.all_reduce([1, 2])),
            (TypeError, "dtype object", lambda: comm.all_reduce(np.array([object()]))),
            (ValueError, "read-only", lambda: comm.all_reduce(frozen)),
            (TypeError, "out has dtype float32", lambda: comm.all_gather(np.ones(2), np.ones(4, np.float32))),
            (ValueError, "out has 3 elements", lambda: comm.all_gather(np.ones(2), np.ones(3))),
            (ValueError, "cannot share evenly", lambda: comm.reduce_scatter(np.ones(3))),
            (ValueError, "root is 2", lambda: comm.broadcast(np.ones(2), 2)),
            (ValueError, "peer is", lambda: comm.send(np.ones(2), comm.rank)),
            (TypeError, "use SUM and divide", lambda: comm.all_reduce(np.ones(2, int), cc.ReduceOp.AVG)),
            (ValueError, "expected 2 whole numbers", lambda: comm.all_gather_v(np.ones(2), [2])),
            (ValueError, "must pass out", lambda: comm.scatter(None, 1 - comm.rank)),
        ]:
            with pytest.raises(error, match=message):
                call()
        assert comm.all_reduce(np.ones(1))[0] == 2

    run_ranks(2, rank)


def test_what_is_no_operation_is_refused_before_anything_is_sent():
    def rank(comm):
        x = np.ones(2 * comm.size)
        for op in (None, "sum", 0):
            for call in (
                lambda op=op: comm.all_reduce(x, op),
                lambda op=op: comm.all_reduce(x, op, async_op=True),
                lambda op=op: comm.reduce(x, 0, op),
                lambda op=op: comm.reduce_scatter(x, None, op),
                lambda op=op: comm.reduce_scatter_v(x, [2] * comm.size, None, op),
                lambda op=op: comm.scan(x, op),
            ):
                with pytest.raises(TypeError, match=f"op is {op!r}; expected a ReduceOp: SUM"):
                    call()
        assert comm.all_reduce(np.ones(1))[0] == comm.size

    run_ranks(1, rank)
    run_ranks(2, rank)


def test_a_wrong_timeout_is_named():
    for kind, wrong in ((ValueError, -1), (ValueError, 0), (ValueError, float("nan")), (TypeError, "x")):
        with pytest.raises(kind, match="init: timeout is .*; expected a number of seconds above 0, or inf"):
            cc.init(timeout=wrong)


def test_wrong_algorithms_are_named(monkeypatch):
    for kind, wrong, message in (
        (TypeError, "ring", "init: algorithms is 'ring'; expected names of algorithms by collective"),
        (ValueError, {"reduce_all": "ring"}, "init: algorithms: unknown collective 'reduce_all'"),
        (ValueError, {"all_reduce": 3}, "init: algorithms: all_reduce has no algorithm 3; it has: direct, "),
        (ValueError, {"scan": "direct", "all_reduce": "ring"}, "all_reduce by ring does not reduce in rank order"),
    ):
        with pytest.raises(kind, match=message):
            cc.init(algorithms=wrong, deterministic=True)
    monkeypatch.setenv("COLLECTIVES_ALGORITHMS", "all_reduce=rings")
    with pytest.raises(ValueError, match="COLLECTIVES_ALGORITHMS: all_reduce has no algorithm 'rings'"):
        cc.init()


def test_algorithms_that_init_is_given(monkeypatch):
    monkeypatch.setenv("COLLECTIVES_ALGORITHMS", "all_reduce=ring,broadcast=chain")
    with cc.init(algorithms={"all_reduce": "one_hop"}) as comm:
        assert comm.explain("all_reduce", 1 << 20).algorithm == "one_hop"
        assert comm.dup().explain("broadcast", 8).algorithm == "chain"


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 3e6])
def test_no_limit_of_time(timeout):
    def rank(comm):
        comm.timeout = timeout
        for _ in range(3):
            comm.all_reduce(np.ones(300))
            assert comm.all_reduce(np.ones(300), async_op=True).wait(timeout)[0] == 3

    run_ranks(3, rank)


def test_alone():
    with cc.init() as comm:
        assert (comm.rank, comm.size) == (0, 1)
        assert comm.all_reduce(np.ones(3), cc.ReduceOp.AVG).tolist() == [1, 1, 1]
        comm.barrier()
        assert comm.stats.bytes_sent == 0
    with pytest.raises(ValueError, match="closed"):
        comm.barrier()
