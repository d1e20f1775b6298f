"""What one rank of a contestant is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parallel.configuration import TrainingConfiguration
from parallel.data import Corpus


@dataclass(frozen=True)
class Learner:
    """A model that steps together with those of the other ranks.

    `step()` takes one optimizer step on this rank's share of the next global batch, and returns its loss (the mean
    over the global batch, or over the share alone; None where only other ranks know it) and the seconds that it waited
    in collectives, where they are known.
    `hush(True)` lets it do the same work without any communication, so that the ranks' weights part ways, and
    `hush(False)` brings the communication back.
    """

    step: Callable[[], tuple[float | None, float | None]]
    hush: Callable[[bool], None]


@dataclass(frozen=True)
class Contestant:
    """A rank that has joined the others of its job; the model is yet to be built."""

    description: str
    barrier: Callable[[], object]
    build: Callable[[TrainingConfiguration, Corpus], Learner]
