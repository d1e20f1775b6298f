"""What every message transport must guarantee, as one function that each implementation has to pass.

Call `check_transport` on every rank of a job of any size. It raises AssertionError, naming the rule and the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from transports.base import LABEL_BYTES, NO_LABEL, Ledger, Request, Transport

_SECONDS: Final = 30.0


def _label(number: int) -> bytes:
    return number.to_bytes(LABEL_BYTES, "little")


def _pattern(sender: int, receiver: int, number: int, size: int) -> bytes:
    """Bytes that differ with everything that could be mixed up."""
    seed = bytes((sender * 7 + receiver * 31 + number * 13 + k) % 256 for k in range(251))
    return (seed * (size // len(seed) + 1))[:size]


def _complete(transport: Transport, requests: list[Request]) -> None:
    for _ in range(100_000):
        if all(request.done for request in requests):
            return
        transport.progress(_SECONDS)
    raise AssertionError(f"rank {transport.rank}: messages do not complete")


def _others(transport: Transport) -> list[int]:
    return [peer for peer in range(transport.size) if peer != transport.rank]


def _exchange(transport: Transport, channel: int, sizes: list[int]) -> Ledger:
    """Everyone sends everyone one message of each size, all at once; returns what was counted."""
    ledger, rank = Ledger(), transport.rank
    buffers = {(peer, n): bytearray(size) for peer in _others(transport) for n, size in enumerate(sizes)}
    requests = [
        transport.recv(peer, channel, NO_LABEL, memoryview(buffer), ledger) for (peer, _), buffer in buffers.items()
    ]
    for peer in _others(transport):
        for number, size in enumerate(sizes):
            data = memoryview(_pattern(rank, peer, number, size))
            requests.append(transport.send(peer, channel, NO_LABEL, data, ledger))
    _complete(transport, requests)
    for (peer, number), buffer in buffers.items():
        assert buffer == _pattern(peer, rank, number, len(buffer)), f"message {number} from {peer} is not what was sent"
    return ledger


def sizes_arrive(transport: Transport) -> None:
    """Messages of any size arrive whole and unchanged, empty ones too."""
    _exchange(transport, 1, [0, 1, 3, 4095, 4096, 4097, 65_537])


def order_is_kept(transport: Transport) -> None:
    """Messages of one channel are received in the order in which they were sent."""
    _exchange(transport, 2, [5] * 200)


def everyone_at_once(transport: Transport) -> None:
    """Large messages between all pairs, both ways at once, do not block each other."""
    _exchange(transport, 3, [8 << 20])


def bytes_are_counted(transport: Transport) -> None:
    """The ledger holds the payload bytes of every peer, exactly, in both directions."""
    sizes = [0, 10, 5000, 100_000]
    ledger = _exchange(transport, 4, sizes)
    expected = dict.fromkeys(_others(transport), sum(sizes))
    assert {p: n for p, n in ledger.sent.items() if n} == expected, f"sent is {dict(ledger.sent)}, expected {expected}"
    assert {p: n for p, n in ledger.received.items() if n} == expected, (
        f"received is {dict(ledger.received)}, expected {expected}"
    )


def channels_are_independent(transport: Transport) -> None:
    """A message on one channel is received though earlier ones on other channels have not been asked for."""
    ledger, rank = Ledger(), transport.rank
    channels = [1 << 40, 7, (1 << 63) + 5]
    sends = []
    for peer in _others(transport):
        for channel in channels:
            data = memoryview(_pattern(rank, peer, channel % 97, 3000))
            sends.append(transport.send(peer, channel, _label(channel % 97), data, ledger))
    for channel in reversed(channels):
        for peer in _others(transport):
            buffer = bytearray(3000)
            _complete(transport, [transport.recv(peer, channel, _label(channel % 97), memoryview(buffer), ledger)])
            assert buffer == _pattern(peer, rank, channel % 97, 3000), (
                f"channel {channel:#x} from {peer} brought another's message"
            )
    _complete(transport, sends)


def buffers_are_left_alone(transport: Transport) -> None:
    """Nothing is written to a posted buffer until its message comes, and nothing beside it ever."""
    ledger, rank, size = Ledger(), transport.rank, transport.size
    if size == 1:
        return
    after, before = (rank + 1) % size, (rank - 1) % size
    memory = bytearray(b"\xee" * 300)
    receive = transport.recv(before, 9, NO_LABEL, memoryview(memory)[100:200], ledger)
    if not receive.done:
        transport.progress(0.0)
    assert receive.done or memory == b"\xee" * 300, "a posted buffer changed before its message was complete"
    send = transport.send(after, 9, NO_LABEL, memoryview(b"\x11" * 100), ledger)
    _complete(transport, [receive, send])
    assert memory == b"\xee" * 100 + b"\x11" * 100 + b"\xee" * 100, "bytes beside the posted buffer changed"


def wrong_peers_are_refused(transport: Transport) -> None:
    """A peer that is not another rank of the job is a ValueError."""
    for peer in (transport.rank, transport.size, -1):
        try:
            transport.send(peer, 1, NO_LABEL, memoryview(b"x"), Ledger())
        except ValueError:
            continue
        raise AssertionError(f"sending to peer {peer} was accepted")


def empty_progress_returns(transport: Transport) -> None:
    """With nothing under way, progress returns in the time given, False."""
    assert transport.progress(0.0) in (False, True)


RULES: Final[tuple[Callable[[Transport], None], ...]] = (
    sizes_arrive,
    order_is_kept,
    channels_are_independent,
    everyone_at_once,
    bytes_are_counted,
    buffers_are_left_alone,
    wrong_peers_are_refused,
    empty_progress_returns,
)


def check_transport(transport: Transport) -> None:
    """Put a transport through every rule; collective over all its ranks.

    Raises AssertionError that names the rule, what it guarantees, and the rank.
    """
    for rule in RULES:
        try:
            rule(transport)
        except AssertionError as error:
            raise AssertionError(
                f"rank {transport.rank}, {transport.name}, {rule.__name__} ({rule.__doc__}): {error}"
            ) from None
