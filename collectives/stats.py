"""What a communicator has done so far, as numbers that do not change any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot; every mapping is by collective, bytes are payload bytes counted by the transport as they crossed it."""

    sent: Mapping[str, Mapping[int, int]]
    """collective -> rank -> bytes sent to it."""
    received: Mapping[str, Mapping[int, int]]
    calls: Mapping[str, int]
    wait_seconds: Mapping[str, float]
    """Seconds that this rank spent in calls, and in `Work.wait`; of calls of a few KiB over shared memory, only long waits."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes sent by this rank in all calls of the communicator."""
        return sum(sum(peers.values()) for peers in self.sent.values())

    @property
    def bytes_received(self) -> int:
        """Payload bytes received by this rank in all calls of the communicator."""
        return sum(sum(peers.values()) for peers in self.received.values())


def frozen(counts: dict[str, dict[int, int]]) -> Mapping[str, Mapping[int, int]]:
    """A read-only copy."""
    return MappingProxyType({name: MappingProxyType(dict(peers)) for name, peers in counts.items()})
