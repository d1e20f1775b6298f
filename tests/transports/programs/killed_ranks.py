"""Kills all ranks of `argv[1]` jobs over shared memory at random moments; nothing may remain.

To be run as the first process of new namespaces and with a TMPDIR of its own, so that everything which is there is its own.
"""

import fcntl
import os
import random
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import numpy as np

import collectives as cc

RANKS = 3
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def open_loopback():
    with socket.socket() as any_socket:
        request = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", request)[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def traces():
    """What of shared memory can be seen: open memfds, Unix sockets, files, processes."""
    memfds = []
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            memfds += [str(path)] * ("memfd:" in str(path.readlink()))
        except OSError:
            continue
    sockets = Path("/proc/net/unix").read_text().splitlines()[1:]
    files = [str(path) for folder in ("/dev/shm", os.environ["TMPDIR"]) for path in Path(folder).iterdir()]
    processes = [path.name for path in Path("/proc").glob("[0-9]*")]
    return memfds, sockets, files, processes


def rank(number, port, ready):
    os.environ |= {"COLLECTIVES_RANK": str(number), "COLLECTIVES_SIZE": str(RANKS), "COLLECTIVES_TOKEN": "ab"}
    os.environ |= {"COLLECTIVES_JOB": "killed", "COLLECTIVES_RENDEZVOUS": f"127.0.0.1:{port}"}
    comm = cc.init("shm", timeout=30)
    inner = comm.split(0)
    x = inner.empty(100_000)
    os.write(ready, b"r")
    while True:
        x[:] = 1
        inner.all_reduce(x)
        comm.sendrecv(x, (number + 1) % RANKS, np.empty(100_000, np.float32), (number - 1) % RANKS)


open_loopback()
seed = time.time_ns()
moments = random.Random(seed)
before = traces()
joined = 0
for job in range(int(sys.argv[1])):
    reader, writer = os.pipe()
    ranks = []
    for number in range(RANKS):
        process = os.fork()
        if process == 0:
            os.close(reader)
            try:
                rank(number, 20000 + job, writer)
            finally:
                os._exit(1)  # the others are killed already
        ranks.append(process)
    os.close(writer)
    if job == 0:
        while joined < RANKS:
            joined += len(os.read(reader, RANKS))
        assert len(traces()[0]) == RANKS
    else:
        time.sleep(moments.uniform(0, 0.15))
    moments.shuffle(ranks)
    for process in ranks:
        os.kill(process, signal.SIGKILL)
    for process in ranks:
        os.waitpid(process, 0)
    os.close(reader)
    after = traces()
    assert after == before, f"seed {seed}, job {job}: {after}, not {before}"
print("nothing remains")
