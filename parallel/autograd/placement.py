"""Placements: how the ranks of a tensor-parallel axis hold one value together, and how operations change that.

A gradient that one rank forgot to add up is wrong in silence; with placements it is an error where it is written. Every row
of the table of operations says what placements it takes. The names follow Megatron-LM (Shoeybi 2019, arXiv 1909.08053,
section 3; Korthikanti 2022, arXiv 2205.05198, section 4.2) and the rules the types of values under `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class PlacementError(TypeError):
    """An operation on values that are not placed as it needs them."""


@dataclass(frozen=True)
class Placement:
    """How ranks hold a value. `kind`: replicated, copied, partial or sharded; `dimension`, if sharded: counted from the end."""

    kind: str
    dimension: int = 0

    def __str__(self) -> str:
        return f"sharded on dimension {self.dimension}" if self.kind == "sharded" else self.kind


REPLICATED = Placement("replicated")
"""The same on all ranks, and so is its gradient."""

COPIED = Placement("copied")
"""The same on all ranks, each of which makes a part of the gradient: the parts are still to be added up."""

PARTIAL = Placement("partial")
"""Each rank has a part of a sum; the gradient of the sum is the gradient of every part."""

FEATURES = Placement("sharded", -1)
"""Of a value (…, positions, width): each rank has a run of the width; of a weight (outputs, inputs), of the inputs."""

SEQUENCE = Placement("sharded", -2)
"""Of a value (…, positions, width): each rank has a run of the positions."""

OUTPUTS = SEQUENCE
"""Of a weight (outputs, inputs): each rank has a run of the outputs."""

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
        if all(placement is REPLICATED for placement in key) and (summing is None or key != summing[:-1]):
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
