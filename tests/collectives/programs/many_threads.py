"""Threads of one process that send and receive on one communicator at a time, each with a tag of its own."""

import sys
import threading

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


threads = [threading.Thread(target=exchange, args=(tag,), daemon=True) for tag in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(20)
assert len(finished) == 6
print("all threads finished")
