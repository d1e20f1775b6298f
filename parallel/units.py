"""Units: parameters that lie side by side in one flat array, and are gathered, reduced and updated together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kernels import fused
from parallel.autograd import COPIED, Array

if TYPE_CHECKING:
    from parallel.nn import GPT, Module, Parameter

Allocate = Callable[[int, Any], Array]
"""`allocate(elements, dtype)`: a new flat array."""

GRAIN = 64
"""Elements: every rank's part of a unit is a multiple of it, so that no two share a cache line of any dtype."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its unit."""

    parameter: Parameter
    start: int

    @property
    def stop(self) -> int:
        """The first element behind it."""
        return self.start + self.parameter.size


class Layout:
    """The order of some parameters in a flat array, padded to `parts` equal parts.

    First come those with weight decay, `decayed` elements; of the others last those that all ranks of a tensor-parallel axis
    have alike, from element `shared` on, and of these last the ones of whose gradient each makes a part, from `copied` on. `tied`:
    another unit holds the same parameter, and the gradients of both are to be added up.
    """

    def __init__(self, name: str, parameters: Sequence[Parameter], parts: int, tied: bool = False) -> None:
        self.name, self.parts, self.tied = name, parts, tied
        self.slots: list[Slot] = []
        self.size = self.decayed = self.shared = self.copied = 0

        def place(parameter: Parameter) -> tuple[bool, bool, bool]:
            return not parameter.decay, not parameter.placement.sharded, parameter.placement is COPIED

        for parameter in sorted(parameters, key=place):
            self.slots.append(Slot(parameter, self.size))
            self.size += parameter.size
            self.decayed += parameter.size if parameter.decay else 0
            self.shared += parameter.size if parameter.placement.sharded else 0
            self.copied += parameter.size if parameter.placement is not COPIED else 0
        self.padded = -(-self.size // (GRAIN * parts)) * GRAIN * parts

    def part(self, index: int) -> slice:
        """Elements of part `index`."""
        length = self.padded // self.parts
        return slice(index * length, (index + 1) * length)

    def inside(self, part: slice) -> Iterator[tuple[Slot, slice, slice]]:
        """Every parameter of which something lies in `part`: its slot, which of its elements, and where in the part."""
        for slot in self.slots:
            start, stop = max(slot.start, part.start), min(slot.stop, part.stop)
            if start < stop:
                yield slot, slice(start - slot.start, stop - slot.start), slice(start - part.start, stop - part.start)

    def views(self, flat: Array) -> Iterator[tuple[Parameter, Array]]:
        """Every parameter's elements in a flat array of `padded` elements, in its shape."""
        for slot in self.slots:
            yield slot.parameter, flat[slot.start : slot.stop].reshape(slot.parameter.shape)

    def first_values(self, seed: int, part: slice, out: Array) -> None:
        """Fill `out` with the first values of `part`, drawing no others; padding is 0."""
        out.fill(0)
        for slot, elements, place in self.inside(part):
            out[place] = slot.parameter.initial_values(seed, elements.start, elements.stop)


def by_module(model: GPT, parts: int) -> list[Layout]:
    """One unit for everything that is in no block, and one for each block, in the order of forward.

    An output head with a weight of its own, and the embedding that it is a copy of, are units by themselves.
    """
    blocks = [Layout(f"blocks.{n}", _parameters(block), parts) for n, block in model.blocks.items()]
    inside = {slot.parameter for block in blocks for slot in block.slots}
    rest = [parameter for parameter in _parameters(model) if parameter not in inside]
    apart = [parameter for parameter in rest if _apart(model, parameter)]
    others = [parameter for parameter in rest if parameter not in apart]
    units = [Layout(parameter.name, [parameter], parts, tied=True) for parameter in apart]
    return [*([Layout("rest", others, parts)] if others else []), *units, *blocks]


def by_size(model: GPT, parts: int, itemsize: int, first: int, others: int) -> list[Layout]:
    """Buckets of at least `first` bytes (the one that backward fills first, the last here) and `others` bytes.

    What is apart in `by_module` is so here. Parameters count whole, so that tensor-parallel ranks, whose parts may be unequal, have
    the same ones in every bucket.
    """
    buckets: list[list[Parameter]] = [[]]
    limit = first
    for parameter in reversed(_parameters(model)):
        bytes_ = sum(math.prod(p.whole_shape) for p in buckets[-1]) * itemsize
        if bytes_ >= limit or (bytes_ and _apart(model, parameter) != _apart(model, buckets[-1][-1])):
            limit = others if bytes_ >= limit else limit
            buckets.append([])
        buckets[-1].append(parameter)
    count = len(buckets)
    named = [(f"bucket {count - number}", list(reversed(bucket))) for number, bucket in enumerate(buckets)]
    return [Layout(name, bucket, parts, tied=_apart(model, bucket[0])) for name, bucket in reversed(named)]


def _parameters(module: Module) -> list[Parameter]:
    return [parameter for _, parameter in module.named_parameters()]


def _apart(model: GPT, parameter: Parameter) -> bool:
    """Whether it is tied, and yet in two places."""
    return bool(parameter.copy_of) or (model.extent.untied and parameter.name == "token_embedding.weight")


class Pool:
    """Flat arrays that are used for a while and given back, so that there are never more than were needed at once.

    `bytes` counts all that were made.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._free: list[Array] = []
        self.bytes = 0

    def take(self, elements: int, dtype: Any) -> Array:
        """An array of so many elements, with anything in them."""
        for number, array in enumerate(self._free):
            if array.size == elements and array.dtype == dtype:
                return self._free.pop(number)
        array = self._allocate(elements, dtype)
        self.bytes += array.nbytes
        return array

    def give(self, array: Array) -> None:
        """Take back what `take` returned."""
        self._free.append(array)


@dataclass
class Shard:
    """What one rank updates: parameters in the optimizer's precision, the gradient, and Adam's two moments, all flat.

    `values`: float32 or float64. `copy`: where the rounded values go in mixed precision. `decayed`: how many of the first
    elements decay.
    """

    layout: Layout
    part: slice
    values: Array
    gradient: Array
    copy: Array | None
    first_moment: Array
    second_moment: Array

    @property
    def decayed(self) -> int:
        """How many of the first elements decay."""
        return max(0, min(self.layout.decayed, int(self.part.stop)) - int(self.part.start))

    def sum_of_squares(self) -> float:
        """Of the gradient."""
        return fused.sum_of_squares(self.gradient)


def convert(source: Array, target: Array) -> None:
    """Copy between dtypes, each element rounded once."""
    if source.dtype == target.dtype:
        target[...] = source
    else:
        fused.convert(source, target)
