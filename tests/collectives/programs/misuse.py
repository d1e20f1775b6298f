"""A rank that passes every kind of wrong argument, and must be told before anything is sent."""

import sys

import numpy as np

import collectives as cc

comm = cc.init(sys.argv[1], timeout=20)
other = 1 - comm.rank
x, pair = np.ones(4), np.ones((2, 4))


def refused(kind, text, call):
    try:
        call()
    except kind as error:
        assert text in str(error), f"{text} not in {error}"
        return
    raise AssertionError(f"no {kind}: {text}")


for wrong, said in ((0.5, "0.5 (float)"), ("0", "'0' (str)"), (None, "None (NoneType)"), (np.float64(0), "(float64)")):
    for call in (
        lambda root: comm.broadcast(x, root),
        lambda root: comm.broadcast(x, root, async_op=True),
        lambda root: comm.reduce(x, root),
        lambda root: comm.gather(x, root),
        lambda root: comm.scatter(pair, root),
    ):
        refused(TypeError, "root is ", lambda call=call, wrong=wrong: call(wrong))
        refused(TypeError, f"{said}; expected a rank, 0 to 1", lambda call=call, wrong=wrong: call(wrong))
    for call in (
        lambda peer: comm.send(x, peer),
        lambda peer: comm.recv(x, peer),
        lambda peer: comm.recv(x, peer, async_op=True),
    ):
        refused(TypeError, f"{said}; expected another rank, 0 to 1", lambda call=call, wrong=wrong: call(wrong))
    refused(TypeError, "to is ", lambda wrong=wrong: comm.sendrecv(x, wrong, x, other))
    refused(TypeError, "source is ", lambda wrong=wrong: comm.sendrecv(x, other, x, wrong))
    for call in (lambda tag: comm.send(x, other, tag), lambda tag: comm.recv(x, other, tag)):
        refused(TypeError, f"{said}; expected 0 to 4294967295", lambda call=call, wrong=wrong: call(wrong))
    if wrong is not None:
        refused(TypeError, "split: color is ", lambda wrong=wrong: comm.split(wrong))
    refused(TypeError, "split: key is ", lambda wrong=wrong: comm.split(0, wrong))
    refused(TypeError, "all_gather_v: counts[1] is ", lambda wrong=wrong: comm.all_gather_v(x, [4, wrong]))
    refused(TypeError, "reduce_scatter_v: counts[0] is ", lambda wrong=wrong: comm.reduce_scatter_v(x, [wrong, 4]))
    refused(
        TypeError, "all_to_all_v: receive_counts[0] is ", lambda wrong=wrong: comm.all_to_all_v(x, [2, 2], [wrong, 2])
    )
# Nothing of a refused exchange stays posted: the next one gets what belongs to it.
for wrong in (x.astype(object), np.broadcast_to(x, (2, 4))):
    refused((TypeError, ValueError), "", lambda wrong=wrong: comm.sendrecv(x, other, wrong, other))
refused(TypeError, "x has dtype object", lambda: comm.sendrecv(x.astype(object), other, x, other))
assert comm.sendrecv(np.full(4, comm.rank), other, np.zeros(4, int), other)[0] == other
work = comm.all_reduce(np.ones(4), async_op=True)
for wrong in ("1", 0, -1.0, float("nan")):
    refused((TypeError, ValueError), "wait: timeout is", lambda wrong=wrong: work.wait(timeout=wrong))
assert work.wait(timeout=5)[0] == 2
refused(ValueError, "peer is 2; expected another rank", lambda: comm.send(x, np.int64(2)))
refused(ValueError, "tag is -1; expected 0 to", lambda: comm.recv(x, other, -1))
refused(ValueError, "split: color is -1; expected", lambda: comm.split(-1))
refused(ValueError, "split: key is 9223372036854775808; expected", lambda: comm.split(0, 1 << 63))
refused(TypeError, "all_gather_v: counts is None; expected 2 whole numbers", lambda: comm.all_gather_v(x, None))
refused(ValueError, "all_gather_v: counts is (4, -4); expected", lambda: comm.all_gather_v(x, [4, -4]))
refused(ValueError, "empty: shape is -1; expected whole numbers from 0", lambda: comm.empty(-1))
refused(ValueError, "empty: shape is (3, -2); expected", lambda: comm.empty((3, -2)))
refused(TypeError, "empty: shape is 1.5 (float); expected", lambda: comm.empty(1.5))
refused(TypeError, "empty: shape is None (NoneType); expected", lambda: comm.empty(None))
refused(TypeError, "empty: shape is 'a' (str); expected", lambda: comm.empty((2, "a")))
refused(TypeError, "empty: the array has dtype object; expected one of bool", lambda: comm.empty(2, object))
refused(MemoryError, "empty: shape (1099511627776, 1099511627776)", lambda: comm.empty((1 << 40, 1 << 40)))
for shape in ((), (0,), (3, 0), (2, 3), np.int64(2), [2, np.int32(2)], np.array([2, 2])):
    found = comm.empty(shape, np.int16)
    assert found.shape == np.empty(shape).shape
    found[...] = 1
    comm.all_reduce(found)
    assert (found == 2).all()

# numpy's integers are integers, over every way in.
for kind in (np.int64, np.uint8, np.int16):
    one = kind(1)
    assert comm.broadcast(np.full(4, comm.rank), one).all()
    assert comm.broadcast(np.full(4, comm.rank), one, async_op=True).wait().all()
    assert comm.reduce(x, one) is None or comm.rank == 1
    assert comm.gather(x, one) is None or comm.rank == 1
    out = np.zeros(4)
    assert comm.scatter(pair if comm.rank == 1 else None, one, out).all()
    assert comm.sendrecv(x, kind(other), np.zeros(4), kind(other), kind(7)).all()
    if comm.rank == 0:
        comm.send(x, one, kind(3))
        comm.send(x, one, kind(3), async_op=True).wait()
    else:
        assert comm.recv(np.zeros(4), kind(0), kind(3)).all()
        assert comm.recv(np.zeros(4), kind(0), kind(3), async_op=True).wait().all()
    assert comm.all_gather_v(np.ones(comm.rank + 1), np.array([1, 2], kind)).size == 3
    assert comm.split(kind(1), -comm.rank).rank == other
assert comm.all_reduce(np.ones(2))[0] == 2
print(f"rank {comm.rank} is told over {sys.argv[1]}")
