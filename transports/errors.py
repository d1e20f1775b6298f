"""What can go wrong between ranks, as exception types and as a record that travels to every other rank.

A fault that concerns the whole job is a `Failure`: who met it, what it is called, and the text a user reads. The rank that
meets it raises its exception and sends the record to all others (`Transport.abort`), so that each of them raises the same
type with the original cause instead of waiting.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, replace
from typing import Final

_LARGEST_RECORD: Final = 1 << 14


class CommunicationError(RuntimeError):
    """Base of every error that this library raises about peers, transports and collectives."""


class PeerLost(CommunicationError):
    """A rank ended, or its connection broke, while others still counted on it."""


class TransportUnavailable(CommunicationError):
    """The transport cannot serve here; the message says what is missing and how to get it."""


class RendezvousError(CommunicationError):
    """The ranks could not find each other, or disagree about who they are."""


class AuthenticationError(CommunicationError):
    """A process without the job's secret tried to join, or the secrets differ."""


class Aborted(CommunicationError):
    """Another rank, or this one, called `abort`; the message carries the reason given."""


class LabelMismatch(CommunicationError):
    """A message arrived whose label, or length, is not the one expected on its channel.

    The collectives layer turns it into `CollectiveMismatch`, which names both calls.
    """

    def __init__(self, peer: int, channel: int, ours: bytes, theirs: bytes, sizes: tuple[int, int] | None = None):
        self.peer, self.channel, self.ours, self.theirs, self.sizes = peer, channel, ours, theirs, sizes
        detail = (
            f"{sizes[0]} bytes expected, {sizes[1]} arrived"
            if sizes
            else f"{ours.hex()} expected, {theirs.hex()} arrived"
        )
        super().__init__(f"message from rank {peer} on channel {channel:#x} does not fit: {detail}")


@dataclass(frozen=True, slots=True)
class Failure:
    """The first cause of a job's failure: `kind` is the exception's name, `origin` the rank that met it."""

    kind: str
    origin: int
    message: str

    def encode(self, largest: int = _LARGEST_RECORD) -> bytes:
        """As JSON in ASCII, of at most `largest` bytes: a message that is too long loses its end."""
        whole = self._record()
        if len(whole) <= largest:
            return whole
        kept = bisect_right(range(largest), largest, key=lambda count: len(self._shortened(count)._record()))
        return self._shortened(max(0, kept - 1))._record()

    def _record(self) -> bytes:
        return json.dumps(asdict(self), ensure_ascii=True).encode()

    def _shortened(self, count: int) -> Failure:
        return replace(self, message=self.message[:count] + " …")

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Failure:
        """The inverse of `encode`; a record that does not parse becomes a plain `Aborted` failure."""
        try:
            fields = json.loads(bytes(data))
            return cls(str(fields["kind"]), int(fields["origin"]), str(fields["message"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return cls("Aborted", -1, "a peer aborted the job, and its reason could not be read")


class JobFailed(CommunicationError):
    """Raised by a transport once the job has failed; `failure` is the first cause that this rank learnt of."""

    def __init__(self, failure: Failure):
        self.failure = failure
        super().__init__(failure.message)
