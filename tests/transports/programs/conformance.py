"""A rank that puts its transport through the conformance check and says so."""

import sys

import collectives as cc
from transports.conformance import check_transport

comm = cc.init(sys.argv[1], timeout=60)
check_transport(comm._job.transport)
comm.close()
print(f"rank {comm.rank} conforms over {sys.argv[1]}")
