"""A rank that meets every kind of trouble over shared memory, one job of `init` after the other."""

import os
import signal
import time

import numpy as np

import collectives as cc
from collectives.start import launched_rank


def caught(kind, call, *words):
    began = time.monotonic()
    try:
        call()
    except kind as error:
        text = str(error) + " ".join(getattr(error, "__notes__", ()))
        missing = [word for word in words if word not in text]
        assert not missing, f"{missing} not in {text}"
        assert time.monotonic() - began < 10
        return
    raise AssertionError(f"no {kind}")


def mismatch(comm):
    """Rank 1 calls something else, in both ways of calling; both calls are named on every rank."""
    other = comm.rank == 1
    x = np.ones(5 if other else 70_000, np.float32)
    caught(
        cc.CollectiveMismatch,
        lambda: comm.broadcast(x, 0) if other else comm.all_reduce(x),
        "rank 1 called broadcast(float32 × 5, root 0)",
        "all_reduce(float32 × 70000, SUM)",
    )
    # A failed communicator refuses further calls with that cause.
    caught(cc.CollectiveMismatch, lambda: comm.all_reduce(np.ones(2)), "called")
    caught(cc.CollectiveMismatch, lambda: comm.all_reduce(np.ones(2), async_op=True).wait(), "called")


def message_mismatch(comm):
    if comm.rank == 0:
        comm.send(np.ones(4), 1, 3)
    other = comm.rank == 1
    caught(
        cc.CollectiveMismatch,
        lambda: comm.recv(np.ones(5), 0, 3) if other else comm.barrier(),
        "send/recv(float64 × 5)",
        "send/recv(float64 × 4)",
    )


def late(comm):
    """Rank 2 waits for a message that nobody sends, with more patience than the others, who wait for it."""
    comm.all_reduce(np.ones(2))
    if comm.rank == 2:
        caught(cc.CollectiveTimeout, lambda: comm.recv(np.ones(3), 0), "rank 2")
    else:
        comm.timeout = 0.3
        caught(
            cc.CollectiveTimeout,
            comm.barrier,
            "still waiting for rank 2 (its last call was number 1, all_reduce(float64 × 2, SUM))",
        )


def interrupted(comm):
    def raises():
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        comm.all_reduce(np.ones(100_000))

    if comm.rank == 0:
        caught(KeyboardInterrupt, raises)
    elif comm.rank == 1:
        caught(cc.Aborted, lambda: comm.recv(np.ones(3), 0), "KeyboardInterrupt", "all_reduce(float64 × 100000, SUM)")
    else:
        caught(cc.Aborted, lambda: comm.recv(np.ones(3), 0, async_op=True).wait(), "KeyboardInterrupt")


def left(comm):
    if comm.rank == 1:
        comm.close()
    elif comm.rank == 0:
        caught(cc.PeerLost, lambda: comm.recv(np.ones(2), 1), "rank 1", "left normally")
    else:
        caught(cc.PeerLost, lambda: comm.barrier(), "rank 1")


def polled(comm):
    """Who only polls learns as well that a rank has left."""
    if comm.rank == 1:
        comm.close()
    else:
        work = comm.all_reduce(np.ones(50_000), async_op=True)
        caught(cc.PeerLost, lambda: [None for _ in iter(work.done, True)], "rank 1")


def no_room(comm):
    """Rank 1 has no shared memory left; the communicator stays of use."""
    if comm.rank == 1:
        heap = comm._job.transport.heap
        whole, heap._free = heap._free, []
    caught(MemoryError, comm.dup, "rank 1 has no shared memory left")
    if comm.rank == 1:
        heap._free = whole
    assert comm.dup().all_reduce(np.ones(2))[0] == comm.size


def aborted(comm):
    if comm.rank == 2:
        comm.abort("that is enough")
    caught(cc.Aborted, lambda: [comm.all_reduce(np.ones(1)) for _ in iter(int, 1)], "that is enough")


def closed(comm):
    """Neither a closed communicator, nor those split from it, nor a forked child touch shared memory."""
    part, x = comm.dup(), np.ones(3)
    child = os.fork()
    if child == 0:
        refused = 0
        for group in (comm, part):
            for call in (lambda g=group: g.all_reduce(x), group.barrier):
                try:
                    call()
                except (ValueError, cc.CommunicationError):
                    refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    assert part.all_reduce(x.copy())[0] == comm.size
    plan = part.plan_all_reduce(x)
    y = np.ones(300_000)
    work = part.all_reduce(y, async_op=True)
    comm.barrier()
    part.close()
    assert (work.wait() == comm.size).all()  # what is under way ends
    caught((ValueError, RuntimeError), plan, "")
    comm.close()
    caught(ValueError, comm.barrier, "closed")
    caught(ValueError, lambda: part.all_reduce(x), "closed")


def uneven(comm):
    """Rank 1 expects more than rank 0 sends; nothing in the label tells."""
    counts = np.eye(3, dtype=int)[comm.rank] * 2
    expected = counts + (np.arange(3) == 0) if comm.rank == 1 else counts
    caught(
        cc.CollectiveMismatch,
        lambda: (comm.all_to_all_v(np.ones(2, np.int16), counts, expected), comm.barrier()),
        "0 bytes come where 2 were expected: the element counts differ",
        "all_to_all(int16 × 0)",
    )


def direct_or_not(comm):
    """Rank 2 runs a schedule where the others run none."""
    x = np.ones(6, np.float32)
    caught(
        cc.CollectiveMismatch,
        lambda: comm.all_to_all_v(x, [2] * 3, [2] * 3) if comm.rank == 2 else comm.all_to_all(x),
        "all_to_all(float32 × 2)",
        "rank 2 called all_to_all(float32 × 0)",
    )


def other_algorithm(comm):
    caught(
        cc.CollectiveMismatch,
        lambda: comm.all_reduce(np.ones(100_000)),
        "rank 1 called all_reduce(float64 × 100000, SUM)",
        "not the algorithm or the slice size",
        "init(algorithms=…)",
    )


FORCED = {"all_reduce": "ring", "barrier": "dissemination", "broadcast": "chain"}
troubles = (closed, mismatch, message_mismatch, late, interrupted, left, polled, no_room, aborted)
plan = [(trouble, {}) for trouble in (*troubles, uneven, direct_or_not)] + [(trouble, FORCED) for trouble in troubles]
plan.append((other_algorithm, {"all_reduce": "recursive_doubling" if launched_rank() == 1 else "ring"}))
for trouble, algorithms in plan:
    world = cc.init("shm", timeout=30, algorithms=algorithms)
    trouble(world)
    world.close()
print(f"rank {world.rank} fails as it should")
