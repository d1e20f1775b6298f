import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transports.base import NO_LABEL, Ledger, Mailbox, Request
from transports.errors import AuthenticationError, RendezvousError
from transports.wire import (
    Frame,
    FrameReader,
    Handshake,
    Identity,
    Message,
    MessageReader,
    State,
    encode_header,
    encode_message,
)


def stream_of(messages):
    parts = []
    for kind, channel, payload in messages:
        parts += [encode_header(kind, channel, NO_LABEL, len(payload)), payload]
    return b"".join(parts)


def read(data, cut):
    """Feed `data` in pieces of at most `cut()` bytes; returns the frames that came out."""
    mailbox, seen = Mailbox(), []
    reader = FrameReader(
        lambda channel, label, size: mailbox.arriving(0, channel, label, size),
        lambda arrival: seen.append((Frame.DATA, arrival.channel, bytes(arrival.data))),
        lambda kind, payload: seen.append((kind, 0, payload)),
    )
    while data:
        target = reader.target()
        piece = data[: min(len(target), cut())]
        target[: len(piece)] = piece
        reader.received(len(piece))
        data = data[len(piece) :]
    return seen


MESSAGES = st.lists(
    st.tuples(
        st.just(Frame.DATA), st.integers(0, 2**64 - 1), st.binary(max_size=200) | st.integers(15_000, 70_000).map(bytes)
    )
    | st.tuples(st.just(Frame.ABORT), st.just(0), st.binary(max_size=50))
    | st.just((Frame.BYE, 0, b"")),
    max_size=6,
)


@given(MESSAGES, st.integers(0, 2**32))
def test_frames_survive_any_cut(messages, seed):
    chooser = random.Random(seed)
    assert read(stream_of(messages), lambda: chooser.choice([1, 7, 48, 1000, 60_000])) == messages


def test_every_split_of_two_frames():
    messages = [(Frame.DATA, 5, b"hello"), (Frame.ABORT, 0, b"why"), (Frame.DATA, 6, b"")]
    data = stream_of(messages)
    for first in range(1, len(data)):
        cuts = iter([first, len(data)])
        assert read(data, lambda cuts=cuts: next(cuts, 1 << 20)) == messages


@given(st.binary(min_size=60, max_size=200).filter(lambda data: data[0] not in (1, 2, 3)))
def test_garbage_is_no_frame(data):
    with pytest.raises(ValueError, match="no frame"):
        read(data, lambda: 1000)


def identity(rank, **changes):
    return Identity(
        **({"job": "j", "rank": rank, "size": 2, "generation": 0, "host": "h", "port": 1, "pid": 2} | changes)
    )


def meet(joiner, host):
    """Run both sides byte by byte; returns the errors of both."""
    errors = []
    readers = {id(joiner): MessageReader(), id(host): MessageReader()}
    pending = [(joiner, host)]
    while pending:
        sender, receiver = pending.pop(0)
        data, sender.outgoing = sender.outgoing, b""
        for byte in data:
            message = readers[id(receiver)].feed(bytes([byte]))
            if message:
                try:
                    receiver.receive(*message)
                except (RendezvousError, AuthenticationError) as error:
                    errors.append(error)
                if receiver.outgoing:
                    pending.append((receiver, sender))
    return errors


def test_handshake():
    joiner, host = Handshake(identity(1), b"s"), Handshake(identity(0), b"s", lambda peer: None)
    assert meet(joiner, host) == []
    assert joiner.state is host.state is State.DONE
    assert (joiner.peer.rank, host.peer.rank) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"job": "k"}, "another job"), ({"size": 3}, "another number of ranks"), ({"protocol": 9}, "another version")],
)
def test_strangers_are_refused_on_both_sides(changes, said):
    errors = meet(Handshake(identity(1, **changes), b"s"), Handshake(identity(0), b"s", lambda peer: None))
    assert len(errors) == 2
    assert all(said in str(error) for error in errors)


def test_wrong_secret():
    joiner, host = Handshake(identity(1), b"wrong"), Handshake(identity(0), b"s", lambda peer: None)
    errors = meet(joiner, host)
    assert isinstance(errors[0], AuthenticationError)
    assert "COLLECTIVES_TOKEN" in str(errors[0])
    assert host.state is State.AWAIT_PROOF


@given(st.binary(min_size=9, max_size=100).filter(lambda data: not data.startswith(b"CCR1")))
def test_garbage_is_no_handshake(data):
    reader = MessageReader()
    with pytest.raises(RendezvousError, match="does not speak"):
        for byte in data:
            reader.feed(bytes([byte]))


def test_a_stranger_cannot_make_us_allocate():
    with pytest.raises(RendezvousError):
        MessageReader().feed(encode_message(Message.HELLO, b"")[:5] + (1 << 31).to_bytes(4, "little"))


def test_mailbox_keeps_what_is_not_asked_for():
    mailbox = Mailbox()
    for number in range(3):
        arrival = mailbox.arriving(4, 7, NO_LABEL, 1)
        arrival.data[:] = bytes([number])
        mailbox.finish(arrival)
    for number in range(3):
        request = Request(4, 7, NO_LABEL, memoryview(bytearray(1)), Ledger())
        mailbox.post(request)
        assert request.done
        assert request.data[0] == number
