"""Ranks of which number 1 ends as the first argument says while a child, forked behind Python's back, holds its sockets."""

import ctypes
import os
import signal
import sys
import time

import numpy as np

import collectives as cc

comm = cc.init(timeout=60)
others = comm.split(0 if comm.rank != 1 else None)
x = np.ones(100_000)
comm.all_reduce(x)
if comm.rank == 1:
    libc = ctypes.CDLL(None)
    child = libc.fork()
    if child == 0:
        libc.alarm(100)
        while True:
            libc.pause()
    print(child, flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    comm.send(x, 0)
    comm.close()
    os._exit(0)
if sys.argv[1] == "kill":
    while True:
        comm.all_reduce(x)
# Longer than a silent connection of an ended process is kept; rank 0 says when it is enough.
deadline = time.monotonic() + 1.5
while others.broadcast(np.array([time.monotonic() < deadline]))[0]:
    others.all_reduce(x)
if comm.rank == 0:
    assert comm.recv(np.zeros(100_000), 1)[0] == 3
