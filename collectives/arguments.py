"""What a caller passes beside arrays: whole numbers, tags and counts, checked before anything is sent."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from collectives.arrays import Array


def integer(value: object, name: str, expected: str) -> int:
    """A Python int of what is an integer, numpy's included; nothing else is rounded or converted."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}") from None


def check_tag(tag: int) -> int:
    """The tag of a message; raises TypeError or ValueError for anything else."""
    expected = f"0 to {(1 << 32) - 1}"
    tag = integer(tag, "tag", expected)
    if not 0 <= tag < 1 << 32:
        raise ValueError(f"tag is {tag}; expected {expected}")
    return tag


def check_counts(counts: Sequence[int], size: int, name: str, collective: str) -> tuple[int, ...]:
    """The counts of `size` ranks; raises TypeError or ValueError, naming the argument, for anything else."""
    expected = f"{size} whole numbers from 0, one a rank"
    try:
        given = tuple(counts)
    except TypeError:
        raise TypeError(f"{collective}: {name} is {counts!r}; expected {expected}") from None
    found = tuple(integer(count, f"{collective}: {name}[{rank}]", "a whole number") for rank, count in enumerate(given))
    if len(found) != size or min(found) < 0:
        raise ValueError(f"{collective}: {name} is {found}; expected {expected}")
    return found


def check_total(array: Array, counts: tuple[int, ...], collective: str, name: str) -> None:
    """Raise ValueError unless `counts` add up to the elements of the array."""
    if array.size != sum(counts):
        raise ValueError(f"{collective}: x has {array.size} elements, but {name} is {sum(counts)}")


def block_shape(array: Array, size: int, collective: str) -> tuple[int, ...]:
    """The shape of one of `size` even blocks: of the first dimension, or failing that of the flat array."""
    if array.ndim and array.shape[0] % size == 0:
        return (array.shape[0] // size, *array.shape[1:])
    if array.size % size == 0:
        return (array.size // size,)
    raise ValueError(
        f"{collective}: x has {array.size} elements (shape {array.shape}), which {size} ranks cannot share evenly; "
        f"pad it, or use {collective}_v with explicit counts"
    )
