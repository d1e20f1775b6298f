"""The mesh of ranks: named axes, each of which is a communicator."""

from __future__ import annotations

import hashlib
import math
import platform
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collectives import Communicator

AXES = ("dp", "pp", "cp", "tp")
"""From the outermost to the innermost: neighbours along the last talk most, and are to share a host."""


class MeshError(ValueError):
    """A layout that is no layout, or one that does not fit the ranks."""


def parse_layout(text: str) -> dict[str, int]:
    """Return the size of every axis of a layout such as dp2,tp2,pp2, 1 for those that it does not name; raises MeshError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(dp|pp|cp|tp)([1-9][0-9]*)\s*", part)
        if match is None:
            raise MeshError(
                f"--layout {text!r} is not known: expected axes among {', '.join(AXES)}, each with its number of ranks, "
                f"such as dp2,tp2,pp2, but {part.strip()!r} is none"
            )
        if match[1] in sizes:
            raise MeshError(f"--layout {text!r} gives {match[1]} twice")
        sizes[match[1]] = int(match[2])
    return {axis: sizes.get(axis, 1) for axis in AXES}


def layout_name(sizes: dict[str, int]) -> str:
    """Return the layout in its shortest form, from the outermost axis: dp4, or dp2,pp2,tp2."""
    return ",".join(f"{axis}{sizes[axis]}" for axis in AXES if sizes[axis] > 1) or "dp1"


class Mesh:
    """Ranks arranged along named axes: `mesh.dp`, `mesh.pp`, `mesh.cp`, `mesh.tp` are this rank's communicators.

    Ranks are numbered host by host, and the innermost axis, tp, takes neighbours, so that its groups share a host wherever
    their size divides the ranks of every host. Arguments: `comm`, which is split, and the size of every axis, 1 by default.
    Collective. Raises MeshError unless the sizes' product is the number of ranks.
    """

    def __init__(self, comm: Communicator, *, dp: int = 1, pp: int = 1, cp: int = 1, tp: int = 1) -> None:
        self.sizes = {"dp": dp, "pp": pp, "cp": cp, "tp": tp}
        for axis, size in self.sizes.items():
            if size < 1:
                raise MeshError(f"axis {axis} has {size} ranks; expected at least 1")
        product = math.prod(self.sizes.values())
        if product != comm.size:
            rest = product // dp
            fitting = (
                f": dp{comm.size // rest} would fit" if comm.size % rest == 0 else f", which {rest} does not divide"
            )
            raise MeshError(
                f"layout {layout_name(self.sizes)} is for {product} ranks, but there are {comm.size}{fitting}"
            )
        self.comm = comm
        self._hosts = _hosts(comm)
        order = sorted(range(comm.size), key=lambda rank: (self._hosts[rank], rank))
        shape = tuple(self.sizes.values())
        self._coordinates = {
            rank: tuple(int(n) for n in np.unravel_index(place, shape)) for place, rank in enumerate(order)
        }
        self.coordinates = self.place(comm.rank)
        self.dp, self.pp, self.cp, self.tp = (self.axis(axis) for axis in AXES)

    def place(self, rank: int) -> dict[str, int]:
        """Return the coordinates of a rank."""
        return dict(zip(AXES, self._coordinates[rank], strict=True))

    def along(self, axis: str, rank: int) -> list[int]:
        """Return the ranks that differ from this one along one axis only, itself among them, in their order along it."""
        index, there = AXES.index(axis), self._coordinates[rank]
        rest = (*there[:index], *there[index + 1 :])
        group = [
            (place[index], other)
            for other, place in self._coordinates.items()
            if (*place[:index], *place[index + 1 :]) == rest
        ]
        return [other for _, other in sorted(group)]

    def axis(self, *names: str) -> Communicator:
        """Return a new communicator of the ranks that differ from this one in these axes only; collective."""
        kept = [index for index, axis in enumerate(AXES) if axis not in names]
        mine = self._coordinates[self.comm.rank]
        color = int(np.ravel_multi_index([mine[i] for i in kept], [self.sizes[AXES[i]] for i in kept])) if kept else 0
        moving = [index for index in range(len(AXES)) if index not in kept]
        key = int(np.ravel_multi_index([mine[i] for i in moving], [self.sizes[AXES[i]] for i in moving]))
        group = self.comm.split(color, key)
        assert group is not None
        return group

    def describe(self) -> str:
        """Return which rank is where: its host, its coordinates, and which axes stay within a host."""
        wide = len(str(self.comm.size - 1))
        lines = [
            f"rank {rank:>{wide}}  host {self._hosts[rank]}  "
            + " ".join(
                f"{axis} {n}" for axis, n in zip(AXES, self._coordinates[rank], strict=True) if self.sizes[axis] > 1
            )
            for rank in range(self.comm.size)
        ]
        lines += [
            f"{axis}: {size} ranks, {'across hosts' if self._crosses(axis) else 'within a host'}"
            for axis, size in self.sizes.items()
            if size > 1
        ]
        return "\n".join(line.rstrip() for line in lines)

    def _crosses(self, axis: str) -> bool:
        """Whether some ranks that differ along this axis alone are on different hosts."""
        return any(len({self._hosts[other] for other in self.along(axis, rank)}) > 1 for rank in self._coordinates)


def _hosts(comm: Communicator) -> Sequence[int]:
    """The number of every rank's host, in the order of the first rank there."""
    mine = np.frombuffer(hashlib.sha256(platform.node().encode()).digest(), np.uint8)
    names = [row.tobytes() for row in comm.all_gather(mine)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]
