"""Messages between the driver and the ranks."""

import socket

import pytest

from bench.harness.protocol import Channel, Decoder, encode

MESSAGES = [{"do": "go", "repeats": 3}, {}, {"text": "two\nlines µ"}]


def test_messages_survive_any_cut():
    data = b"".join(map(encode, MESSAGES))
    for cut in range(len(data) + 1):
        decoder = Decoder()
        assert decoder.feed(data[:cut]) + decoder.feed(data[cut:]) == MESSAGES
    decoder = Decoder()
    assert [message for byte in data for message in decoder.feed(bytes([byte]))] == MESSAGES


def test_a_channel_tells_silence_from_the_end():
    ours, theirs = map(Channel, socket.socketpair())
    with pytest.raises(TimeoutError):
        ours.receive(0.001)
    for message in MESSAGES:
        theirs.send(message)
    theirs.close()
    assert [ours.receive(1) for _ in MESSAGES] == MESSAGES
    with pytest.raises(EOFError):
        ours.receive(1)
    ours.close()
