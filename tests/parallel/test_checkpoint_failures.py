"""Saves that are killed, full disks, and two jobs in one directory: what was saved before stays whole."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from collectives import Communicator
from collectives.testing import run_ranks
from parallel.checkpoint import CheckpointError, Piece, Saver, latest, load, save, steps

ROOT = Path(__file__).parents[2]
SMALL = 1000


def piece(rank: int, value: float, sizes: list[int]) -> Piece:
    """Rank `rank`'s piece of a vector that is cut into these sizes."""
    total = sum(sizes)
    return Piece("w", (total,), (0,), (total,), sum(sizes[:rank]), np.full(sizes[rank], float(value)))


def checked(directory: Path, ranks: int = 3) -> float:
    """Load the latest checkpoint of small pieces; returns the value that it is full of."""
    found = np.zeros(ranks * SMALL)
    run_ranks(1, lambda world: load(directory, world, [Piece.whole("w", found)]))
    assert (found == found[0]).all()
    return float(found[0])


def fails(directory: Path, sizes: list[int], *, background: bool) -> list[str]:
    """Save step 1 small, then step 2 in these sizes, which must fail; returns what each rank was told."""

    def rank(world: Communicator) -> str:
        save(directory, world, [piece(world.rank, 1, [SMALL] * len(sizes))], None, 1)
        if not background:
            with pytest.raises(CheckpointError) as caught:
                save(directory, world, [piece(world.rank, 2, sizes)], None, 2)
            return str(caught.value)
        with Saver(directory, world) as saver:
            saver.start([piece(world.rank, 2, sizes)], None, 2)
            with pytest.raises(CheckpointError) as caught:
                saver.wait()
            # The failure was told, and is over.
            saver.start([piece(world.rank, 3, [SMALL] * len(sizes))], None, 3)
        return str(caught.value)

    return run_ranks(len(sizes), rank, timeout=30)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".partial")]


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_told_to_all_ranks_and_harms_nothing(tiny_disk: Path, background: bool) -> None:
    messages = fails(tiny_disk, [SMALL, SMALL, 100_000], background=background)
    assert len(set(messages)) == 1
    assert re.search(
        r"rank \d: cannot write .*/rank-000\d-of-0003.safetensors: \[Errno 28\] No space left", messages[0]
    )
    assert leftovers(tiny_disk) == []
    assert steps(tiny_disk) == ([1, 3] if background else [1])
    assert checked(tiny_disk) == (3 if background else 1)


@pytest.mark.parametrize("background", [False, True])
def test_a_limit_of_file_sizes_names_the_rank_and_its_file(tmp_path: Path, background: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        messages = fails(tmp_path, [SMALL, 100_000, SMALL], background=background)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(set(messages)) == 1
    assert re.search(
        r"^rank 1: cannot write .*/\.partial-step-00000002-.*/rank-0001-of-0003.safetensors: \[Errno 27\] File too large;",
        messages[0],
    )
    assert leftovers(tmp_path) == []
    assert checked(tmp_path) == (3 if background else 1)


def test_no_room_for_the_manifest_is_told_too(tiny_disk: Path) -> None:
    def rank(world: Communicator) -> None:
        save(tiny_disk, world, [piece(world.rank, 1, [SMALL, SMALL])], None, 1)
        with pytest.raises(CheckpointError, match=r"rank 0: cannot write .*/manifest.json: \[Errno 28\] No space left"):
            save(tiny_disk, world, [piece(world.rank, 2, [SMALL, SMALL])], "x" * 500_000, 2)

    run_ranks(2, rank)
    assert leftovers(tiny_disk) == []
    assert checked(tiny_disk, 2) == 1


def test_a_directory_that_cannot_be_is_told_to_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    def rank(world: Communicator) -> None:
        with pytest.raises(CheckpointError, match=r"rank 0: .*File exists: .*file"):
            save(tmp_path / "file", world, [piece(world.rank, 1, [1, 1])], None, 1)

    run_ranks(2, rank)


def test_another_job_that_saves_there_is_named(tmp_path: Path) -> None:
    def rank(world: Communicator) -> None:
        with Saver(tmp_path, world) as saver:
            saver.start([piece(world.rank, 1, [SMALL, SMALL])], None, 1)
            other = world.dup()
            with pytest.raises(
                CheckpointError,
                match=rf"rank 0: another job is saving to {tmp_path} \(it is process {os.getpid()} on .*\); give each job",
            ):
                save(tmp_path, other, [piece(world.rank, 2, [SMALL, SMALL])], None, 2)
            saver.wait()
        save(tmp_path, world, [piece(world.rank, 2, [SMALL, SMALL])], None, 2)

    run_ranks(2, rank)
    assert checked(tmp_path, 2) == 2


def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    left = tmp_path / ".partial-step-00000001-0123abcd"
    left.mkdir()
    (left / "rank-0000-of-0001.safetensors").write_bytes(b"half")
    (tmp_path / ".partial-latest").write_text("step")
    assert latest(tmp_path) is None
    run_ranks(2, lambda world: save(tmp_path, world, [piece(world.rank, 1, [SMALL, SMALL])], None, 1))
    assert leftovers(tmp_path) == []
    assert steps(tmp_path) == [1]


def test_a_training_that_fails_while_saving_does_not_wait_for_others(tmp_path: Path) -> None:
    def rank(world: Communicator) -> None:
        with pytest.raises(ZeroDivisionError), Saver(tmp_path, world) as saver:
            saver.start([piece(world.rank, 1, [SMALL, SMALL])], None, 1)
            raise ZeroDivisionError

    run_ranks(2, rank, timeout=20)
    assert steps(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["next", "again", "random"])
def test_a_save_that_is_killed_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, mode: str) -> None:
    program = str(Path(__file__).parent / "programs" / "crash_in_save.py")
    done = subprocess.run(
        [sys.executable, program, mode, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
