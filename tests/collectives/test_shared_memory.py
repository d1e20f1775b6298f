"""The native engine over shared memory, in real processes, against the specification."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = Path(__file__).parent / "programs"


# Those that fold in rank order, as the specification's bits are made; and some that only move data.
SCHEDULES = (
    "all_reduce=one_hop,reduce_scatter=direct,reduce=direct,scan=direct,all_gather=ring,broadcast=chain,"
    "gather=binomial,scatter=binomial,all_to_all=pairwise,barrier=dissemination"
)


def run(ranks, program, *arguments, timeout=100, **variables):
    command = [sys.executable, "-m", "collectives", "run", "-n", str(ranks)]
    for name, value in variables.items():
        command += ["--env", f"{name}={value}"]
    command += [str(PROGRAMS / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_board_has_room_for_a_communicator_of_fewer_ranks():
    native = pytest.importorskip("collectives._native")
    sizes = [native.board_bytes(ranks) for ranks in range(1, 100)]
    assert sizes == sorted(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_random_collectives_agree_with_the_specification(ranks):
    done = run(ranks, "random_collectives.py", "auto", 7 + ranks, 120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("120 rounds") == ranks


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_random_schedules_agree_with_the_specification(ranks):
    done = run(ranks, "random_collectives.py", "shm", ranks, 80, COLLECTIVES_ALGORITHMS=SCHEDULES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("80 rounds") == ranks


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
def test_thousands_of_random_collectives_agree_with_the_specification(ranks):
    done = run(ranks, "random_collectives.py", "shm", time.time_ns() % 2**31, 10_000, timeout=3000)
    assert done.returncode == 0, done.stderr
    seed = time.time_ns() % 2**31
    done = run(ranks, "random_collectives.py", "shm", seed, 2000, timeout=3000, COLLECTIVES_ALGORITHMS=SCHEDULES)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_every_algorithm_gives_the_bits_and_stats_of_the_reference_engine(ranks):
    done = run(ranks, "native_schedules.py", ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("algorithms agree") == ranks


@pytest.mark.slow
def test_mismatches_timeouts_and_interrupts_name_the_culprit():
    done = run(3, "troubles.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as it should") == 3


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_wrong_arguments_are_refused_before_anything_is_sent(transport):
    done = run(2, "misuse.py", transport)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("is told") == 2


@pytest.mark.slow
def test_what_is_dropped_in_flight_is_kept_until_the_engine_lets_go_of_it():
    done = run(2, "forgotten.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("nothing was missed") == 2


@pytest.mark.slow
def test_threads_share_a_communicator():
    done = run(2, "many_threads.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all threads finished") == 2
