"""Collective communication between ranks, on the arrays that you have.

    import numpy as np, collectives as cc
    comm = cc.init()
    comm.all_reduce(np.ones(4))

See `init` and `Communicator`. Start several ranks with `python -m collectives run -n 4 script.py`.
"""

from collectives.communicator import Communicator
from collectives.errors import (
    Aborted,
    AuthenticationError,
    CollectiveMismatch,
    CollectiveTimeout,
    CommunicationError,
    PeerLost,
    RendezvousError,
    ScheduleError,
    TransportUnavailable,
)
from collectives.start import init, launch, under_launcher
from collectives.stats import Stats
from collectives.work import Work
from kernels import ReduceOp

__all__ = [
    "Aborted",
    "AuthenticationError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "CommunicationError",
    "Communicator",
    "PeerLost",
    "ReduceOp",
    "RendezvousError",
    "ScheduleError",
    "Stats",
    "TransportUnavailable",
    "Work",
    "init",
    "launch",
    "under_launcher",
]
