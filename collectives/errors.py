"""Every error that a call can raise, and how a failure record becomes the exception of its kind."""

from __future__ import annotations

from transports.errors import (
    Aborted,
    AuthenticationError,
    CommunicationError,
    Failure,
    PeerLost,
    RendezvousError,
    TransportUnavailable,
)

__all__ = [
    "Aborted",
    "AuthenticationError",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "CommunicationError",
    "PeerLost",
    "RendezvousError",
    "ScheduleError",
    "TransportUnavailable",
    "exception_of",
]


class CollectiveMismatch(CommunicationError):
    """Two ranks made different calls where the same one was due; both calls are named."""


class CollectiveTimeout(CommunicationError):
    """A collective did not finish in time; the message names the ranks that have not arrived."""


class ScheduleError(CommunicationError):
    """A schedule is wrong, found by the verifier: `rank`, `step` and `chunk` say where (None: nowhere in particular)."""

    def __init__(self, message: str, rank: int | None = None, step: int | None = None, chunk: str | None = None):
        self.rank, self.step, self.chunk = rank, step, chunk
        place = ", ".join(
            f"{name} {value}" for name, value in (("rank", rank), ("step", step), ("chunk", chunk)) if value is not None
        )
        super().__init__(f"{place}: {message}" if place else message)


_TYPES: dict[str, type[CommunicationError]] = {
    kind.__name__: kind
    for kind in (
        Aborted,
        AuthenticationError,
        CollectiveMismatch,
        CollectiveTimeout,
        PeerLost,
        RendezvousError,
        TransportUnavailable,
    )
}


def exception_of(failure: Failure, rank: int) -> CommunicationError:
    """The exception that `rank` raises for a failure: of the original kind, with who reported it when it was another rank."""
    kind = _TYPES.get(failure.kind, CommunicationError)
    reporter = (
        "" if failure.origin in (rank, -1) or failure.kind == "PeerLost" else f" (reported by rank {failure.origin})"
    )
    return kind(failure.message + reporter)
