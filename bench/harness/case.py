"""What one benchmark file describes, and how the files are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np

import bench

Array = np.ndarray[Any, np.dtype[Any]]
Call = Callable[[Any, Any, Any], object]

_PERIOD: Final = 61
ITEM_BYTES: Final = 4


@dataclass(frozen=True)
class Case:
    """A collective on `count` float32 elements in all (the S of PERFORMANCE.md), and how each kind of library calls it.

    `data(rank, size, count)` returns what the rank gives and what it must hold afterwards; in place, where the latter
    is shorter, only so much is compared. Both are small whole numbers, so that every order of reduction is exact.
    `ours`, `mpi` and `gloo` run the collective once on (communicator, input, output); gloo's arrays are torch tensors and
    its communicator is torch.distributed.
    """

    name: str
    bus_factor: Callable[[int], float]
    """busbw ÷ algbw on so many ranks."""
    moved: Callable[[int], float]
    """Bytes that so many ranks together must at least read and write in memory, per byte of S; 0: there is no floor."""
    data: Callable[[int, int, int], tuple[Array, Array]]
    ours: Call
    mpi: Call | None = None
    gloo: Call | None = None
    redop: str = "none"
    root: int = -1
    in_place: bool = False
    blocks: bool = False
    """The buffer has one block a rank: the count must be a multiple of the ranks."""

    def count(self, nbytes: int, size: int) -> int:
        """The elements that come closest to a buffer of `nbytes`; none where nothing is carried."""
        if not self.bus_factor(size):
            return 0
        if not self.blocks:
            return max(1, nbytes // ITEM_BYTES)
        return max(1, nbytes // ITEM_BYTES // size) * size


def values(rank: int, count: int) -> Array:
    """What `rank` contributes: whole numbers from 0 to 60, exact in float32 under any sum over up to 2¹⁸ ranks."""
    pattern = ((np.arange(_PERIOD) * 7 + rank * 3) % _PERIOD).astype(np.float32)
    return np.resize(pattern, count)


def total(ranks: int, count: int) -> Array:
    """The sum of what the first `ranks` ranks contribute."""
    return np.resize(np.sum([values(rank, _PERIOD) for rank in range(ranks)], axis=0), count)


def block(array: Array, rank: int, size: int) -> Array:
    """Block `rank` of `size` equal ones."""
    length = len(array) // size
    return array[rank * length : (rank + 1) * length]


def nothing() -> Array:
    """What a rank gives, or must hold, that has no part."""
    return np.empty(0, np.float32)


def _copy(rank: int, size: int, count: int) -> tuple[Array, Array]:
    return values(rank, count), values(rank, count)


COPY: Final = Case("copy", lambda n: 1.0, lambda n: 2.0 * n, _copy, lambda comm, x, out: np.copyto(out, x))
"""Every rank copies S bytes, all at once: the bandwidth that the column `floor` is reckoned from."""


@cache
def cases() -> dict[str, Case]:
    """The `CASE` of every module of this package, by name."""
    found = (
        importlib.import_module(f"bench.{m.name}")
        for m in pkgutil.iter_modules(bench.__path__)
        if m.name not in ("__main__", "train", "training")
    )
    return {module.CASE.name: module.CASE for module in found if hasattr(module, "CASE")}
