"""Dropout whose masks depend on the sample, not on where and when it is computed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from parallel.autograd import Tensor, vjps


@dataclass(frozen=True)
class Draws:
    """What the random numbers of one pass depend on: a seed, a step, and the global number of the first sample."""

    seed: int
    step: int
    first_sample: int


def dropout(x: Tensor, probability: float, site: str, draws: Draws | None) -> Tensor:
    """Zero elements of x (samples, positions, width) with `probability` and scale the others; without draws, return x.

    The mask of a sample depends on the seed, the step, the site's name, and the sample's global number alone: it is the
    same in every layout, and when a layer is computed again.
    """
    if draws is None or probability == 0:
        return x
    digest = hashlib.sha256(f"{draws.seed}/dropout/{draws.step}/{site}".encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    _, positions, width = x.shape
    first = draws.first_sample * positions * width
    return vjps.dropout(x, probability=probability, key=key, first=first, row_stride=width)
