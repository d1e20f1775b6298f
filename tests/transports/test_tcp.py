"""Stream sockets inside one process: what ends a connection, and what does not."""

import os
import socket
import subprocess
import sys

import pytest

from transports.errors import Failure, JobFailed
from transports.life import birth_of, watch
from transports.tcp import TcpTransport
from transports.wire import Identity


def mesh(size, pids=None):
    """Transports of `size` ranks, over pairs of connected sockets; `pids`: the process that each rank claims to be."""
    ends = {}
    for low in range(size):
        for high in range(low + 1, size):
            ends[low, high], ends[high, low] = socket.socketpair()
    processes = pids or [os.getpid()] * size
    who = [Identity("job", rank, size, 0, "here", 0, pid, birth_of(pid)) for rank, pid in enumerate(processes)]
    return [
        TcpTransport(rank, size, {peer: (ends[rank, peer], who[peer]) for peer in range(size) if peer != rank})
        for rank in range(size)
    ]


def test_a_rank_that_closes_after_a_failure_passes_the_cause_on(monkeypatch):
    monkeypatch.setattr("transports.tcp._CLOSE_SECONDS", 0.05)
    first, second, third = mesh(3)
    # The abort of rank 2 has reached rank 0 and not yet rank 1.
    with monkeypatch.context() as slow:
        slow.setattr(third, "_links", {0: third._links[0]})
        third.abort(Failure("Aborted", 2, "enough"))
    for rank in (first, second):
        with pytest.raises(JobFailed) as error:
            rank.progress(5)
        assert error.value.failure == Failure("Aborted", 2, "enough")
        rank.close()
    third.close()


def process():
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd_open, which Linux has from 5.3 on")


@needs_pidfd
def test_a_process_that_ends_is_lost_though_its_socket_stays_open(monkeypatch):
    monkeypatch.setattr("transports.tcp._SILENCE_SECONDS", 0.05)
    with process() as peer:
        transport, other = mesh(2, [os.getpid(), peer.pid])
        assert not transport.progress(0)
        peer.kill()
        peer.wait()
        with pytest.raises(JobFailed) as error:
            for _ in range(3):
                transport.progress(5)
        assert error.value.failure.kind == "PeerLost"
        assert error.value.failure.message.startswith(f"rank 1 (pid {peer.pid} on here) closed its connection")
        transport.close()
        other.close()


@needs_pidfd
def test_what_an_ended_process_has_sent_still_arrives(monkeypatch):
    monkeypatch.setattr("transports.tcp._SILENCE_SECONDS", 0.05)
    with process() as peer:
        transport, other = mesh(2, [os.getpid(), peer.pid])
        peer.kill()
        peer.wait()
        transport.progress(0)
        other.close()
        for _ in range(3):
            transport.progress(0.1)
        assert transport.has_left(1)
        transport.close()


@needs_pidfd
def test_only_the_very_process_is_watched():
    with process() as peer:
        birth = birth_of(peer.pid)
        assert birth == birth_of(peer.pid) != birth_of(os.getpid())
        descriptor = watch(peer.pid, birth)
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)
        for unknown in ("", birth[:-1], birth_of(os.getpid())):
            assert watch(peer.pid, unknown) is None
        peer.kill()
        peer.wait()
        assert watch(peer.pid, birth) is None
