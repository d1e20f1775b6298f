"""What each collective means: which contributions every rank holds before and after.

This table is the only place that says so. The verifier proves schedules against it, the tests compute the expected arrays
from it, and the documentation prints it.

A rank's buffers are made of *blocks*. `(s, b)` is the contribution that rank s holds in block b of its input before the
call. Afterwards block b of rank r's output holds the reduction of the contributions in `result(size, r, root, b)`, each
exactly once; for a collective that only moves data that is a single one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

Contribution = tuple[int, int]
SizeKey = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Collective:
    """One row of the table; every function takes (size, rank, root)."""

    name: str
    meaning: str
    reduces: bool
    rooted: bool
    input_blocks: Callable[[int, int, int], int]
    output_blocks: Callable[[int, int, int], int]
    result: Callable[[int, int, int, int], tuple[Contribution, ...]]
    """(size, rank, root, output block) -> the contributions reduced into it, in the order of the ranks."""
    in_place: Callable[[int, int, int], tuple[int, int] | None]
    """Called in place, the first output block and the first input block that are the same memory; None: no overlap."""
    input_size: Callable[[int, int], SizeKey]
    """(rank, input block) -> a key; blocks with equal keys have equal element counts on all ranks, others may differ."""
    output_size: Callable[[int, int], SizeKey]


def _everyone(size: int, rank: int, root: int) -> int:
    return size


def _one(size: int, rank: int, root: int) -> int:
    return 1


def _root_one(size: int, rank: int, root: int) -> int:
    return 1 if rank == root else 0


def _root_everyone(size: int, rank: int, root: int) -> int:
    return size if rank == root else 0


def _same(rank: int, block: int) -> SizeKey:
    return ()


def _own(rank: int, block: int) -> SizeKey:
    return (rank,)


def _by_block(rank: int, block: int) -> SizeKey:
    return (block,)


COLLECTIVES: Final[dict[str, Collective]] = {
    row.name: row
    for row in (
        Collective(
            "all_reduce", "every rank gets the reduction of all inputs", True, False, _one, _one,
            lambda size, rank, root, block: tuple((s, 0) for s in range(size)),
            lambda size, rank, root: (0, 0), _same, _same,
        ),
        Collective(
            "all_gather", "every rank gets the inputs of all ranks, in the order of the ranks", False, False, _one, _everyone,
            lambda size, rank, root, block: ((block, 0),),
            lambda size, rank, root: (rank, 0), _own, _by_block,
        ),
        Collective(
            "reduce_scatter", "rank r gets the reduction of block r of all inputs", True, False, _everyone, _one,
            lambda size, rank, root, block: tuple((s, rank) for s in range(size)),
            lambda size, rank, root: (0, rank), _by_block, _own,
        ),
        Collective(
            "broadcast", "every rank gets the root's input", False, True, _root_one, _one,
            lambda size, rank, root, block: ((root, 0),),
            lambda size, rank, root: (0, 0) if rank == root else None, _same, _same,
        ),
        Collective(
            "reduce", "the root gets the reduction of all inputs", True, True, _one, _root_one,
            lambda size, rank, root, block: tuple((s, 0) for s in range(size)),
            lambda size, rank, root: (0, 0) if rank == root else None, _same, _same,
        ),
        Collective(
            "gather", "the root gets the inputs of all ranks, in the order of the ranks", False, True, _one, _root_everyone,
            lambda size, rank, root, block: ((block, 0),),
            lambda size, rank, root: (rank, 0) if rank == root else None, _own, _by_block,
        ),
        Collective(
            "scatter", "rank r gets block r of the root's input", False, True, _root_everyone, _one,
            lambda size, rank, root, block: ((root, rank),),
            lambda size, rank, root: (0, rank) if rank == root else None, _by_block, _own,
        ),
        Collective(
            "all_to_all", "block s of rank r's output is block r of rank s's input", False, False, _everyone, _everyone,
            lambda size, rank, root, block: ((block, rank),),
            lambda size, rank, root: (0, 0), lambda rank, block: (rank, block), lambda rank, block: (block, rank),
        ),
        Collective(
            "scan", "rank r gets the reduction of the inputs of ranks 0 to r", True, False, _one, _one,
            lambda size, rank, root, block: tuple((s, 0) for s in range(rank + 1)),
            lambda size, rank, root: (0, 0), _same, _same,
        ),
        Collective(
            "barrier", "no rank returns before every rank has called: each ends with a token of every other",
            False, False, _one, _everyone,
            lambda size, rank, root, block: ((block, 0),),
            lambda size, rank, root: None, _own, _by_block,
        ),
    )
}  # fmt: skip
