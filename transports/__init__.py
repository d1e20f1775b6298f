"""Moving bytes between ranks: transports, rendezvous and launching. Knows no dtype, operation or algorithm.

`connect.connect` makes the transport of this process, `launch.launch` starts processes, `conformance.check_transport` tests one.
"""

from transports.base import Ledger, Request, Transport
from transports.environment import Settings, World
from transports.errors import (
    Aborted,
    AuthenticationError,
    CommunicationError,
    Failure,
    JobFailed,
    LabelMismatch,
    PeerLost,
    RendezvousError,
    TransportUnavailable,
)

__all__ = [
    "Aborted",
    "AuthenticationError",
    "CommunicationError",
    "Failure",
    "JobFailed",
    "LabelMismatch",
    "Ledger",
    "PeerLost",
    "RendezvousError",
    "Request",
    "Settings",
    "Transport",
    "TransportUnavailable",
    "World",
]
