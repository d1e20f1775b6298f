"""Which pipeline schedules there are, and what is published of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from parallel.schedules.table import Schedule
from parallel.schedules.timing import Cost

Maker = Callable[[int, int, int], Schedule]
"""(ranks, micro-batches, chunks a rank) → schedule."""

SYMBOLS = (
    "p ranks, r the rank, M micro-batches, v chunks a rank; F forward of a micro-batch on a rank, B_i and W the input and "
    "weight halves of its backward"
)


class Formula:
    """An expression of SYMBOLS, which is printed as it is computed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._code = compile(text, f"the formula {text}", "eval")

    def __call__(self, **symbols: int | Fraction) -> Any:
        """The value, exact where the symbols are."""
        return eval(self._code, {"__builtins__": {}, "min": min, "max": max}, symbols)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Recipe:
    """A registered schedule: `make(ranks, micro_batches, chunks)` returns its table."""

    name: str
    make: Maker
    chunks: int
    """Chunks a rank, unless others are asked for."""
    any_chunks: bool
    """Whether others may be."""
    idle: Formula
    """Idle time of every rank, as `Times.idle` counts it."""
    idle_if: Formula
    """Where that holds."""
    in_flight: Formula
    """What `most_in_flight` counts."""

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return (self.make.__doc__ or "").strip().partition("\n")[0]


SCHEDULES: dict[str, Recipe] = {}
"""Every schedule, by its name."""


def schedule(
    name: str, *, idle: str, in_flight: str, idle_if: str = "True", chunks: int = 1, any_chunks: bool = False
) -> Callable[[Maker], Maker]:
    """Register the decorated function as schedule `name`, with its formulas over SYMBOLS."""

    def register(make: Maker) -> Maker:
        if name in SCHEDULES:
            raise ValueError(f"there is a schedule {name!r} already")
        SCHEDULES[name] = Recipe(name, make, chunks, any_chunks, Formula(idle), Formula(idle_if), Formula(in_flight))
        return make

    return register


def find(name: str) -> Recipe:
    """The schedule of that name; raises ValueError with those that exist."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; expected one of {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name]


def build(name: str, ranks: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """Return the schedule `name`; without `chunks`, with as many a rank as it takes or, if it takes any, with two.

    Raises ValueError, with what would fit, for an unknown name and for numbers that the schedule does not take.
    """
    recipe = find(name)
    chunks = recipe.chunks if chunks is None else chunks
    for what, count in (("ranks", ranks), ("micro-batches", micro_batches), ("chunks", chunks)):
        if count < 1:
            raise ValueError(f"{name}: the number of {what} must be at least 1, got {count}")
    if chunks != recipe.chunks and not recipe.any_chunks:
        taking = ", ".join(sorted(other.name for other in SCHEDULES.values() if other.any_chunks))
        raise ValueError(f"{name}: chunks a rank must be {recipe.chunks}, got {chunks}; any number fits {taking}")
    return recipe.make(ranks, micro_batches, chunks)


def expected_idle(
    name: str,
    ranks: int,
    chunks: int,
    forward: Cost = 1,
    input_gradient: Cost = 1,
    weight_gradient: Cost = 1,
    micro_batches: int | None = None,
) -> Fraction:
    """The idle time of every rank by the published formula, which `Times.idle` must equal.

    Costs are those of a micro-batch on a rank, all chunks together. Without `micro_batches` there are as many as the formula
    asks for. Raises ValueError where it does not hold for the costs.
    """
    recipe = find(name)
    half, other = Fraction(input_gradient), Fraction(weight_gradient)
    symbols: dict[str, int | Fraction] = {
        "p": ranks,
        "v": chunks,
        "F": Fraction(forward),
        "B_i": half,
        "W": other,
        "B": half + other,
    }
    if not recipe.idle_if(**symbols):
        given = f"F = {forward}, B_i = {input_gradient}, W = {weight_gradient}"
        raise ValueError(f"{name}: the formula of its idle time holds if {recipe.idle_if}; got {given}")
    symbols["M"] = 2 * ranks if micro_batches is None else micro_batches
    return Fraction(recipe.idle(**symbols))


def expected_in_flight(name: str, ranks: int, rank: int, micro_batches: int, chunks: int) -> int:
    """The most micro-batches in flight on a rank, counted in each chunk, by the published formula."""
    return int(find(name).in_flight(p=ranks, r=rank, M=micro_batches, v=chunks))
