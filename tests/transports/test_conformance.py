import threading

import pytest

from transports.base import LABEL_BYTES, NO_LABEL, Ledger
from transports.conformance import check_transport
from transports.errors import JobFailed, LabelMismatch
from transports.inproc import InprocTransport, run_threads


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_inproc_conforms(size):
    run_threads(size, check_transport)


def breaking(monkeypatch, change):
    """Every send of in-process transports goes through `change(send, request)`."""
    original = InprocTransport._post_send
    monkeypatch.setattr(InprocTransport, "_post_send", lambda self, request: change(self, original, request))


def corrupt(self, send, request):
    if len(request.data) > 1:
        request.data = memoryview(b"\0" + bytes(request.data[1:]))
    send(self, request)


def miscount(self, send, request):
    send(self, request)
    request.ledger.sent[request.peer] += 1


def other_channel(self, send, request):
    request.channel %= 1 << 40
    send(self, request)


def swapped():
    held = {}

    def change(self, send, request):
        key = (self.rank, request.peer)
        if len(request.data) == 5 and key not in held:
            held[key] = request
            return
        send(self, request)
        if held.get(key):
            send(self, held[key])
            held[key] = None

    return change


@pytest.mark.parametrize("change", [corrupt, miscount, swapped()], ids=["corrupt", "miscount", "swapped"])
def test_broken_transports_are_caught(monkeypatch, change):
    breaking(monkeypatch, change)
    with pytest.raises(AssertionError):
        run_threads(2, check_transport, timeout=20)


def test_messages_that_do_not_fit():
    def length(transport):
        if transport.rank == 0:
            transport.send(1, 1, NO_LABEL, memoryview(b"abc"), Ledger())
        else:
            transport.recv(0, 1, NO_LABEL, memoryview(bytearray(4)), Ledger())
            while True:
                transport.progress(5)

    with pytest.raises(LabelMismatch, match="4 bytes expected, 3 arrived"):
        run_threads(2, length)


def test_a_mismatch_is_raised_once():
    sent, seen = threading.Event(), threading.Event()

    def rank(transport):
        if transport.rank == 0:
            transport.expect(1, b"\1" * LABEL_BYTES)
            transport.expect(2, b"\1" * LABEL_BYTES)
            sent.wait(10)
            for _ in range(2):
                with pytest.raises(LabelMismatch):
                    transport.progress(5)
            transport.progress(0)
            seen.set()
        else:
            for channel in (1, 2):
                transport.send(0, channel, NO_LABEL, memoryview(b"abc"), Ledger())
            sent.set()
            seen.wait(10)

    run_threads(2, rank)


def test_failure_reaches_everyone():
    from transports.errors import Failure

    def rank(transport):
        if transport.rank == 1:
            transport.abort(Failure("Aborted", 1, "enough"))
            return None
        with pytest.raises(JobFailed, match="enough"):
            while True:
                transport.progress(5)
        return True

    assert run_threads(3, rank) == [True, None, True]
