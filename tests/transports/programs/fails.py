"""Ranks of which number 1 fails in the way that the first argument says, while the others are in a collective."""

import os
import signal
import subprocess
import sys

import numpy as np

import collectives as cc

comm = cc.init(timeout=60)
comm.all_reduce(np.ones(10))
if comm.rank == 1:
    match sys.argv[1]:
        case "raise":
            raise ValueError("this is the cause")
        case "exit":
            sys.exit(7)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "child":
            subprocess.Popen(["sleep", "1000.125"])
            sys.exit(7)
while True:
    comm.all_reduce(np.ones(100_000))
