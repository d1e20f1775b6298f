"""Pieces of global tensors: which elements one holds, and how they map onto those of another.

A piece is a flat range of a box. Its elements fall into a few smaller boxes, its *parts*, each of which lies in
row-major order in one run of the piece's values; so the elements that two pieces share are intersections of
boxes, and copying them is an assignment between two strided views, without any index arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import gt, index
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from parallel.checkpoint.agreement import CheckpointError
from parallel.checkpoint.dtypes import check_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from parallel.autograd import Array

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """The elements of a tensor from `start` on, `extent` of them along each axis."""

    start: Shape
    extent: Shape

    @property
    def size(self) -> int:
        """How many elements it holds; a box of no axes holds one."""
        return math.prod(self.extent)

    @property
    def stop(self) -> Shape:
        """The first coordinate beyond it, along each axis."""
        return tuple(a + n for a, n in zip(self.start, self.extent, strict=True))

    def intersection(self, other: Box) -> Box | None:
        """Return the elements of both, or None if there are none."""
        start = tuple(map(max, self.start, other.start))
        extent = tuple(min(a, b) - c for a, b, c in zip(self.stop, other.stop, start, strict=True))
        return Box(start, extent) if all(n > 0 for n in extent) else None

    def without(self, inner: Box) -> Iterator[Box]:
        """Yield disjoint boxes of the elements that are not in `inner`, which lies within this box."""
        start, extent = list(self.start), list(self.extent)
        for axis, (begin, end) in enumerate(zip(inner.start, inner.stop, strict=True)):
            for first, last in ((start[axis], begin), (end, start[axis] + extent[axis])):
                if first < last:
                    yield Box(
                        (*start[:axis], first, *start[axis + 1 :]), (*extent[:axis], last - first, *extent[axis + 1 :])
                    )
            start[axis], extent[axis] = begin, end - begin

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Return the slices that select this box from an array of the `outer` box."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.start, outer.start, self.extent, strict=True))

    def __str__(self) -> str:
        return "[" + ", ".join(f"{a}:{b}" for a, b in zip(self.start, self.stop, strict=True)) + "]"


@dataclass(frozen=True, slots=True)
class Part:
    """A box of which a piece holds every element, in row-major order from `offset` on."""

    box: Box
    offset: int

    def view(self, values: npt.NDArray[Any], inner: Box) -> npt.NDArray[Any]:
        """Return the elements of `inner`, a box within this one, as a view of the piece's values."""
        array = values[self.offset : self.offset + self.box.size].reshape(self.box.extent)
        selection: tuple[Any, ...] = (*inner.within(self.box), ...)  # without axes, the ellipsis makes this a view
        found: npt.NDArray[Any] = array[selection]
        return found


@dataclass(frozen=True, slots=True)
class Region:
    """What a piece holds, without the values; two pieces of equal regions are replicas."""

    name: str
    shape: Shape
    dtype: str
    start: Shape
    extent: Shape
    begin: int
    count: int

    @classmethod
    def of(cls, document: Sequence[Any]) -> Region:
        """Read back what `document` gave, from JSON."""
        name, shape, dtype, start, extent, begin, count = document
        region = cls(name, tuple(shape), dtype, tuple(start), tuple(extent), begin, count)
        region.check()
        return region

    def document(self) -> list[Any]:
        """Return the fields for JSON, in their order."""
        return [self.name, self.shape, self.dtype, self.start, self.extent, self.begin, self.count]

    @property
    def box(self) -> Box:
        """The box of which this is a range."""
        return Box(self.start, self.extent)

    @property
    def nbytes(self) -> int:
        """The bytes of the values."""
        return self.count * check_dtype(self.dtype).itemsize

    def check(self) -> None:
        """Raise CheckpointError unless the range lies in the box, the box in the tensor, and all can be stored."""
        if not self.name or self.name == "__metadata__":
            raise CheckpointError(f"a piece is named {self.name!r}; expected a text that is not empty or __metadata__")
        numbers = (*self.shape, *self.start, *self.extent)
        axes = len(self.shape) == len(self.start) == len(self.extent)
        if not axes or min(numbers, default=0) < 0 or any(map(gt, self.box.stop, self.shape)):
            raise CheckpointError(
                f"{self.name}: start {self.start} and extent {self.extent} are no box of the global shape {self.shape}"
            )
        if not 0 <= self.begin <= self.begin + self.count <= self.box.size:
            raise CheckpointError(
                f"{self.name}: elements {self.begin} to {self.begin + self.count} are no range of the "
                f"{self.box.size} of its box"
            )
        check_dtype(self.dtype, self.name)

    def parts(self) -> list[Part]:
        """Return the boxes of its elements, at most 2·axes − 1 of them, in the order of the values."""
        found, offset = [], 0
        for box in _boxes(self.start, self.extent, self.begin, self.begin + self.count):
            found.append(Part(box, offset))
            offset += box.size
        return found

    def __str__(self) -> str:
        box = "" if self.extent == self.shape else f" of the box {self.box}"
        return f"elements {self.begin} to {self.begin + self.count}{box} of {self.name} {self.shape}"


@dataclass(frozen=True, eq=False)
class Piece:
    """What one rank holds, or wants, of one global tensor.

    Arguments: `name` and `shape`, of the global tensor; `start` and `extent`, a box of it; `values`, a flat
    array of the box's elements [begin, begin + values.size) in row-major order. So a shard of a slice is a
    piece, a slice is one with begin 0, and `Piece.whole` makes one of a whole tensor.
    """

    name: str
    shape: Shape
    start: Shape
    extent: Shape
    begin: int
    values: Array

    @classmethod
    def whole(cls, name: str, tensor: Array) -> Piece:
        """Return the piece that is all of `tensor`, which it shares; the tensor must be C-contiguous."""
        if not tensor.flags.c_contiguous:
            raise ValueError(f"{name} is not C-contiguous; give Piece.whole an array that is")
        return cls(name, tensor.shape, (0,) * tensor.ndim, tensor.shape, 0, tensor.reshape(-1))

    def region(self) -> Region:
        """Return what it holds; raises CheckpointError if that cannot be."""
        if getattr(self.values, "ndim", None) != 1:
            raise CheckpointError(f"{self.name}: the values have no single axis; expected a flat array")
        shape, start, extent = (tuple(map(index, numbers)) for numbers in (self.shape, self.start, self.extent))
        region = Region(
            self.name, shape, self.values.dtype.name, start, extent, index(self.begin), int(self.values.size)
        )
        region.check()
        return region


def _boxes(start: Shape, extent: Shape, begin: int, end: int) -> Iterator[Box]:
    """Yield the boxes of the elements [begin, end) of a box, in row-major order."""
    if begin == end:
        return
    row = math.prod(extent[1:])
    if begin == 0 and end == math.prod(extent):
        yield Box(start, extent)
        return
    first, last = -(-begin // row), end // row

    def of_row(number: int, low: int, high: int) -> Iterator[Box]:
        for box in _boxes(start[1:], extent[1:], low, high):
            yield Box((start[0] + number, *box.start), (1, *box.extent))

    if first > last:  # within one row
        yield from of_row(last, begin - last * row, end - last * row)
        return
    if begin < first * row:
        yield from of_row(first - 1, begin - (first - 1) * row, row)
    if first < last:
        yield Box((start[0] + first, *start[1:]), (last - first, *extent[1:]))
    if last * row < end:
        yield from of_row(last, 0, end - last * row)


def uncovered(wanted: Box, boxes: Iterable[Box]) -> list[Box]:
    """Return the elements of `wanted` that are in none of the boxes, as disjoint boxes."""
    left = [wanted] if wanted.size else []
    for box in boxes:
        left = [rest for each in left for rest in _outside(each, box)]
    return left


def _outside(box: Box, other: Box) -> Iterable[Box]:
    common = box.intersection(other)
    return (box,) if common is None else box.without(common)


class Overlaps:
    """Finds those of many boxes of one tensor that share elements with a given one."""

    def __init__(self, boxes: Sequence[Box], axes: int) -> None:
        self._starts = np.array([box.start for box in boxes], np.int64).reshape(len(boxes), axes)
        self._stops = np.array([box.stop for box in boxes], np.int64).reshape(len(boxes), axes)

    def of(self, box: Box) -> list[int]:
        """Return the positions of these boxes, ascending."""
        shared = np.minimum(self._stops, box.stop) > np.maximum(self._starts, box.start)
        return [int(n) for n in np.flatnonzero(shared.all(axis=1))]
