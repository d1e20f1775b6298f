"""Threads of one process that send and receive on one communicator at a time, each with a tag of its own."""

import sys
import threading
import time

import numpy as np

import collectives as cc

comm = cc.init("shm", timeout=30)
sys.setswitchinterval(1e-6)
peer, finished = 1 - comm.rank, []


def exchange(tag):
    mine, theirs = np.empty(2), np.empty(2)
    for number in range(400):
        mine[:] = number, tag
        receiving = comm.recv(theirs, peer, tag, async_op=True)
        if number % 2:
            comm.send(mine, peer, tag)
        else:
            comm.send(mine, peer, tag, async_op=True).wait(20)
        receiving.wait()
        assert theirs.tolist() == [number, tag]
    finished.append(tag)


def collective_beside_message():
    # Rank 1 takes part in the collective only when it has the message that rank 0 sends meanwhile.
    x = np.ones(4)
    if comm.rank == 0:
        beside = threading.Thread(target=comm.all_reduce, args=(x,), daemon=True)
        beside.start()
        time.sleep(0.1)
        comm.send(np.ones(3), 1)
        beside.join(20)
    else:
        comm.recv(np.empty(3), 0)
        comm.all_reduce(x)
    assert x[0] == 2


threads = [threading.Thread(target=exchange, args=(tag,), daemon=True) for tag in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(20)
assert len(finished) == 6
collective_beside_message()
print("all threads finished")
