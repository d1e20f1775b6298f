"""What a rank of a pipeline does: forward and backward of one micro-batch through one of its chunks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache


class Kind(Enum):
    """The whole instruction set; sends and receives follow from the places of the stages."""

    FORWARD = "F"
    BACKWARD = "B"
    """Both halves at once."""
    INPUT_GRADIENT = "I"
    """The half of backward that the stage before waits for."""
    WEIGHT_GRADIENT = "W"
    """The half that nobody waits for."""

    __hash__ = object.__hash__
    """A member is one object; the hash of `Enum` is a call in Python, and tables by kind are read for every action."""


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a rank does; `chunk` counts the chunks of that rank. It prints as `F3.1`: micro-batch 3, chunk 1."""

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.micro_batch}.{self.chunk}"


_once = lru_cache(maxsize=1 << 16)  # the rows of all ranks are made of the same actions


@_once
def forward(micro_batch: int, chunk: int = 0) -> Action:
    """Forward of a micro-batch through a chunk."""
    return Action(Kind.FORWARD, chunk, micro_batch)


@_once
def backward(micro_batch: int, chunk: int = 0) -> Action:
    """Both halves of backward."""
    return Action(Kind.BACKWARD, chunk, micro_batch)


@_once
def input_gradient(micro_batch: int, chunk: int = 0) -> Action:
    """The gradient with respect to what the chunk was given."""
    return Action(Kind.INPUT_GRADIENT, chunk, micro_batch)


@_once
def weight_gradient(micro_batch: int, chunk: int = 0) -> Action:
    """The gradient with respect to the chunk's weights; what forward has kept is let go after it."""
    return Action(Kind.WEIGHT_GRADIENT, chunk, micro_batch)
