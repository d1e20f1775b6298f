"""The driver and its ranks, as threads; and one real run."""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.harness.case import Case, cases, values
from bench.harness.contestants import Contestant
from bench.harness.driver import Driver
from bench.harness.jobs import Job, wanted
from bench.harness.protocol import Channel, answer
from bench.harness.worker import Worker
from collectives.testing import run_ranks

RANKS = 2


@contextmanager
def job(name, contestant, leaves_at=None):
    """A job whose ranks are threads; with `leaves_at` rank 1 hangs up when it is asked for that step."""
    pairs = [socket.socketpair() for _ in range(RANKS)]

    def rank(comm):
        channel = Channel(pairs[comm.rank][1])
        worker = Worker(comm.rank, comm.size, {contestant: Contestant("", comm, lambda case: case.ours, comm.barrier)})
        while True:
            try:
                message = channel.receive()
                if message["do"] == leaves_at and comm.rank == 1:
                    return channel.close()
                channel.send(answer(worker.steps, message))
            except (EOFError, OSError):
                return None

    ranks = threading.Thread(target=run_ranks, args=(RANKS, rank))
    ranks.start()
    found = Job(name, {number: Channel(pair[0]) for number, pair in enumerate(pairs)}, {contestant: ""})
    try:
        yield found
    finally:
        found.leave()
        ranks.join()


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("asked", [8, 4 << 20])
def test_a_cell(asked, fresh):
    notes = []
    with job("ours", "tcp") as ours, job("peer", "openmpi") as peer:
        driver = Driver([ours, peer], RANKS, notes.append, fresh=fresh, iterations=2)
        mine, theirs = driver.cell(cases()["all_reduce"], asked)
    assert notes == []
    assert (mine.contestant, theirs.contestant) == ("tcp", "openmpi")
    assert mine.size == asked
    assert mine.wrong == theirs.wrong == 0
    assert mine.ratio == pytest.approx(theirs.microseconds / mine.microseconds)
    assert mine.floor > 0


@pytest.mark.parametrize("asked", [64, 4 << 20])
def test_wrong_elements_are_counted(monkeypatch, asked):
    liar = Case(
        "liar", lambda n: 1.0, lambda n: 0.0, lambda rank, size, count: (values(1, count), values(1, count)),
        lambda comm, x, out: out.fill(7), mpi=lambda comm, x, out: None,
    )  # fmt: skip
    monkeypatch.setitem(cases(), "liar", liar)
    with job("ours", "tcp") as ours:
        (row,) = Driver([ours], RANKS, print, iterations=3).cell(liar, asked)
    assert row.wrong == 3 * RANKS * int((values(1, asked // 4) != 7).sum())


def test_a_call_that_fails_is_left_out_of_its_cell(monkeypatch):
    def fails(comm, x, out):
        raise RuntimeError("not today")

    broken = Case("broken", lambda n: 1.0, lambda n: 0.0, cases()["scan"].data, fails)
    monkeypatch.setitem(cases(), "broken", broken)
    notes = []
    with job("ours", "tcp") as ours:
        driver = Driver([ours], RANKS, notes.append, iterations=1)
        assert driver.cell(broken, 8) == []
        assert len(driver.cell(cases()["scan"], 8)) == 1
    assert notes == ["tcp is left out of broken at 8: RuntimeError: not today"]


@pytest.mark.parametrize("step", ["prepare", "ready", "go", "release"])
def test_a_job_that_ends_leaves_the_others(step):
    notes = []
    with job("ours", "tcp") as ours, job("peer", "openmpi", leaves_at=step) as peer:
        driver = Driver([ours, peer], RANKS, notes.append, iterations=1)
        first = [row.contestant for row in driver.cell(cases()["barrier"], 8)]
        second = [row.contestant for row in driver.cell(cases()["barrier"], 8)]
    assert first == (["tcp", "openmpi"] if step == "release" else ["tcp"])
    assert second == ["tcp"]
    assert "its job ended" in notes[0]


def test_jobs():
    jobs = wanted(["shm", "tcp"], [], print)
    assert jobs == {"ours": ["shm", "heap", "tcp"]}


@pytest.mark.slow
def test_a_real_run(tmp_path):
    record = tmp_path / "bench.json"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COLLECTIVES_", "OMPI_", "PMIX_", "PMI_"))}
    command = [
        sys.executable,
        "-m",
        "bench",
        "all_reduce",
        "barrier",
        "--ranks",
        "2",
        "--sizes",
        "8",
        "--iterations",
        "2",
    ]
    done = subprocess.run(
        [*command, "--transports", "tcp", "--peers", "", "--json", record],
        env=kept,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(record.read_text())["rows"]
    assert [(row["collective"], row["contestant"], row["size"], row["wrong"]) for row in rows] == [
        ("all_reduce", "tcp", 8, 0),
        ("barrier", "tcp", 0, 0),
    ]
    assert rows[0]["microseconds"] > 0
    assert rows[0]["floor"] > 0
