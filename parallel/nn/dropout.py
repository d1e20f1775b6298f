"""Dropout whose masks depend on the sample and the position, not on where and when they are computed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parallel.autograd import Array, Tensor, vjps


@dataclass(frozen=True)
class Draws:
    """What the random numbers of one pass depend on: a seed, a step, and the global number of the first sample.

    `positions`: which of the `sequence` positions of every sample this rank has, in order; None for all.
    """

    seed: int
    step: int
    first_sample: int
    positions: Array | None = None
    sequence: int = 0

    def runs(self, samples: int, positions: int, width: int) -> Iterator[tuple[int, int]]:
        """Yield rows of (samples·positions, width) that follow each other, and the number of the first one's first element."""
        if self.positions is None:
            yield samples * positions, self.first_sample * positions * width
            return
        starts = np.flatnonzero(np.diff(self.positions, prepend=-2) != 1)
        for sample in range(self.first_sample, self.first_sample + samples):
            for start, stop in zip(starts, [*starts[1:], len(self.positions)], strict=True):
                yield int(stop - start), int(sample * self.sequence + self.positions[start]) * width


def dropout(x: Tensor, probability: float, site: str, draws: Draws | None) -> Tensor:
    """Zero elements of x (samples, positions, width) with `probability` and scale the others; without draws, return x.

    The mask of a sample depends on the seed, the step, the site's name, and the sample's global number alone: it is the
    same in every layout, and when a layer is computed again.
    """
    if draws is None or probability == 0:
        return x
    digest = hashlib.sha256(f"{draws.seed}/dropout/{draws.step}/{site}".encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    samples, positions, width = x.shape
    runs = tuple(draws.runs(samples, positions, width))
    return vjps.dropout(x, probability=probability, key=key, runs=runs, row_stride=width)
