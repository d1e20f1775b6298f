"""Shared memory between real processes: limits, namespaces, descriptors, and what remains of ranks that are killed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"
ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd_create")]
LAUNCH = [sys.executable, "-m", "collectives", "run"]


def run(*command, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COLLECTIVES_")}
    return subprocess.run(
        list(map(str, command)),
        env=kept | {"PYTHONPATH": str(ROOT)} | more,
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def namespaces(*flags):
    """The command that runs another in new namespaces; skips the test where the kernel does not permit it."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    tried = run("unshare", *flags, "true")
    if tried.returncode:
        pytest.skip(f"unshare {' '.join(flags)} is not permitted: {tried.stderr.strip()}")
    return ["unshare", *flags]


def said(done):
    """The lines of rank 0 and of rank 1, of which each has one."""
    assert done.returncode == 0, done.stderr
    return [line.partition(" ")[2] for line in sorted(done.stdout.splitlines())]


@pytest.mark.parametrize(
    ("heaps", "reason"),
    [(0.5, "MiB of addresses for shared memory cannot be had"), (1.5, "rank 1 cannot map the heaps of the others")],
)
def test_too_few_addresses(heaps, reason):
    assert said(run(*LAUNCH, "-n", 2, PROGRAMS / "little_memory.py", "auto", heaps)) == ["right over tcp"] * 2
    refusals = said(run(*LAUNCH, "-n", 2, PROGRAMS / "little_memory.py", "shm", heaps))
    assert len(refusals) == 2
    for refusal in refusals:
        assert refusal.startswith("refused: transport shm: rank 1: ")
        assert reason in refusal
        assert "ulimit -v" in refusal


def test_ranks_in_other_network_namespaces():
    namespaces("-n")
    assert said(run(*LAUNCH, "-n", 2, PROGRAMS / "other_network.py", "auto")) == ["right over tcp"] * 2
    refusals = said(run(*LAUNCH, "-n", 2, PROGRAMS / "other_network.py", "shm"))
    text = "refused: transport shm: rank 1 is not on the host of rank 0, or in another network namespace; use transport='tcp'"
    assert refusals == [text] * 2


def test_descriptors_stay_in_their_process():
    done = run(*LAUNCH, "-n", 3, PROGRAMS / "shm_descriptors.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as they should be") == 3


@pytest.mark.parametrize("jobs", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_nothing_remains_of_killed_ranks(jobs, tmp_path):
    apart = namespaces("--net", "--ipc", "--mount", "--pid", "--fork", "--mount-proc")
    own_folders = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    program = [sys.executable, PROGRAMS / "killed_ranks.py", jobs]
    done = run(*apart, "sh", "-c", own_folders, "sh", *program, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "nothing remains\n"), done.stderr


def test_a_small_or_full_dev_shm_makes_no_difference():
    apart = namespaces("--mount")
    fill = "mount -t tmpfs -o size=64k tmpfs /dev/shm && (head -c 65536 /dev/zero > /dev/shm/full; true)"
    command = [*LAUNCH, "-n", 3, PROGRAMS / "every_collective.py", "shm"]
    done = run(*apart, "sh", "-c", f'{fill} && exec "$@"', "sh", *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is right over shm") == 3
