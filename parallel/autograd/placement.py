"""Placements: how the ranks of a tensor-parallel axis hold one value together, and how operations change that.

A gradient that one rank forgot to add up is wrong in silence; with placements it is an error where it is written. Every row
of the table of operations says what placements it takes. The names follow Megatron-LM (Shoeybi 2019, arXiv 1909.08053,
section 3; Korthikanti 2022, arXiv 2205.05198, section 4.2) and the rules the types of values under `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any


class PlacementError(TypeError):
    """An operation on values that are not placed as it needs them."""


class Placement(Enum):
    """How ranks hold a value, (…, positions, width), or a weight, (outputs, inputs)."""

    REPLICATED = "replicated"
    """The same on all ranks, and so is its gradient."""
    COPIED = "copied"
    """The same on all ranks, each of which makes a part of the gradient: the parts are still to be added up."""
    PARTIAL = "partial"
    """Each rank has a part of a sum; the gradient of the sum is the gradient of every part."""
    FEATURES = "sharded by width"
    """Each rank has a run of the width; of a weight, of the inputs."""
    SEQUENCE = "sharded by positions"
    """Each rank has a run of the positions."""
    OUTPUTS = "sharded by outputs"
    """Of a weight: each rank has a run of the outputs, or of the rows of a table."""

    __hash__ = object.__hash__
    """A member is one object; rules are looked up for every operation."""

    def __str__(self) -> str:
        return self.value

    @property
    def sharded(self) -> bool:
        """Whether ranks have different elements."""
        return self in (Placement.FEATURES, Placement.SEQUENCE, Placement.OUTPUTS)


REPLICATED, COPIED, PARTIAL = Placement.REPLICATED, Placement.COPIED, Placement.PARTIAL
FEATURES, SEQUENCE, OUTPUTS = Placement.FEATURES, Placement.SEQUENCE, Placement.OUTPUTS

Rule = Callable[[str, Sequence[Placement], Mapping[str, Any]], Placement]
"""`rule(operation, inputs' placements, options)`: the result's placement, or PlacementError."""


def rule(*rows: tuple[Placement, ...], summing: tuple[Placement, ...] | None = None, hint: str = "") -> Rule:
    """Return the rule whose rows are the placements of the inputs and, last, of the result.

    `summing`: a row that holds besides if the operation is given an `axis`, over which it adds gradients up itself. `hint` ends
    the message where no row fits. All inputs replicated, result replicated, is a row of every rule made so.
    """
    table = {row[:-1]: row[-1] for row in rows}

    def find(operation: str, inputs: Sequence[Placement], options: Mapping[str, Any]) -> Placement:
        key = tuple(inputs)
        if key in table:
            return table[key]
        if all(placement is REPLICATED for placement in key):
            return REPLICATED
        if summing is not None and key == summing[:-1] and options.get("axis") is not None:
            return summing[-1]
        raise _misplaced(operation, key, [(REPLICATED,) * len(key), *table], hint)

    return find


def only(*row: Placement, hint: str = "") -> Rule:
    """Return the rule of an operation between placements, which takes nothing else, not even replicated values."""
    *wanted, result = row

    def find(operation: str, inputs: Sequence[Placement], _options: Mapping[str, Any]) -> Placement:
        if list(inputs) != wanted:
            raise _misplaced(operation, inputs, [wanted], hint)
        return result

    return find


def unchanged(_operation: str, inputs: Sequence[Placement], _options: Mapping[str, Any]) -> Placement:
    """The rule of an operation whose result is placed as its one input, however that is."""
    (placement,) = inputs
    return placement


REPLICATED_ONLY = rule()
"""The rule of an operation that no axis cuts."""


def _misplaced(
    operation: str, found: Sequence[Placement], rows: Sequence[Sequence[Placement]], hint: str
) -> PlacementError:
    takes = "; or ".join(" and ".join(map(str, row)) for row in rows)
    return PlacementError(
        f"{operation} of values that are {' and '.join(map(str, found))}; it takes {takes}{'. ' if hint else ''}{hint}"
    )
