"""Kills saves of two ranks, either at each operation on the file system in turn or at random moments, and loads after each.

Every save is a child of this process. After its end every checkpoint must load, verified, and the latest be that of
the step before or of the step that was being saved.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from collectives.testing import run_ranks
from parallel.checkpoint import Piece, Saver, latest, load, save, steps

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
SIZE = 200_000


def pieces(rank, values):
    half = SIZE // 2
    return [Piece("w", (SIZE,), (0,), (SIZE,), rank * half, values[rank * half :][:half])]


def check(directory, allowed):
    found = np.zeros(SIZE)
    assert latest(directory) in allowed, (latest(directory), allowed, steps(directory))
    for step in steps(directory):
        (saved,) = run_ranks(1, lambda world, step=step: load(directory, world, [Piece.whole("w", found)], step=step))
        assert saved == step
        np.testing.assert_array_equal(found, step % 1000)
    return latest(directory)


def in_child(task):
    child = os.fork()
    if child:
        return child
    try:
        task()
        os._exit(0)
    finally:
        os._exit(1)


def at_each_operation(directory, step, again):
    """Save `step` anew, or the one after it, ending at the first operation, then at the second, and so on."""
    save_step(directory, 1, step)
    for count in range(1, 1000):
        following = step if again else step + 1

        def task(count=count, following=following):
            seen = 0

            def hook(event, arguments):
                nonlocal seen
                # What is removed with its folder goes by its name in that folder, which is open.
                inside = event in ("os.remove", "os.rmdir") and arguments[1] != -1
                if event in EVENTS and (inside or str(directory) in str(arguments[0])):
                    seen += 1
                    if seen == count:
                        os._exit(9)

            sys.addaudithook(hook)
            save_step(directory, 2, following)

        _, status = os.waitpid(in_child(task), 0)
        step = check(directory, (step, following))
        if os.waitstatus_to_exitcode(status) == 0:
            assert count > 20, count
            assert not [*Path(directory).glob(".partial*"), *Path(directory).glob("*.old")]
            return
        assert os.waitstatus_to_exitcode(status) == 9
    raise AssertionError("the save never came to its end")


def save_step(directory, ranks, step):
    values = np.full(SIZE, float(step % 1000))
    if ranks == 1:
        run_ranks(1, lambda world: save(directory, world, [Piece.whole("w", values)], step, step, keep=2))
    else:
        run_ranks(2, lambda world: save(directory, world, pieces(world.rank, values), step, step, keep=2))


def at_random_moments(directory, count):
    save_step(directory, 1, 1)
    step, random_number = 1, random.Random(0)
    for _ in range(count):
        reading, writing = os.pipe()

        def task(step=step, writing=writing):
            def rank(world):
                with Saver(directory, world, keep=2) as saver:
                    for following in range(step + 1, step + 1000):
                        saver.start(pieces(world.rank, np.full(SIZE, float(following % 1000))), following, following)
                        if world.rank == 0:
                            os.write(writing, b".")

            run_ranks(2, rank)

        child = in_child(task)
        os.read(reading, 1)
        time.sleep(random_number.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
        step = check(directory, range(step, step + 1000))
    return step


if __name__ == "__main__":
    mode, directory = sys.argv[1:]
    if mode == "random":
        assert at_random_moments(directory, 40) > 1
    else:
        at_each_operation(directory, 10, again=mode == "again")
