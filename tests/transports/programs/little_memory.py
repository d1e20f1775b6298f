"""Two ranks of which number 1 has addresses for `argv[2]` heaps only, beyond what it takes already; over transport `argv[1]`."""

import resource
import sys
from pathlib import Path

import numpy as np

import collectives as cc
from collectives.start import launched_rank
from transports.heap import PAGE, default_size

if launched_rank() == 1:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    limit = taken + int(float(sys.argv[2]) * default_size())
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    comm = cc.init(sys.argv[1], timeout=30)
except cc.TransportUnavailable as error:
    print(f"refused: {error}")
else:
    assert comm.all_reduce(np.ones(1000))[0] == 2
    assert comm.empty(10).size == 10
    print(f"right over {comm._job.transport.name}")
