"""AdamW, the learning-rate schedule, clipping by the global norm, and loss scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels import fused

if TYPE_CHECKING:
    from parallel.units import Shard


class AdamW:
    """Adam with decoupled weight decay and bias correction (Loshchilov 2019, arXiv 1711.05101), in place.

    Arguments: `shards`, what this rank updates; `betas`, `epsilon`, `weight_decay` as in the paper.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        self.shards, self.betas, self.epsilon, self.weight_decay = shards, betas, epsilon, weight_decay
        self.steps = 0

    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update the values once, from the gradients times `gradient_scale`."""
        self.steps += 1
        for shard in self.shards:
            cut, end = shard.decayed, shard.values.size
            self._update(shard, slice(0, cut), self.weight_decay, learning_rate, gradient_scale)
            self._update(shard, slice(cut, end), 0.0, learning_rate, gradient_scale)

    def _update(self, shard: Shard, run: slice, decay: float, learning_rate: float, gradient_scale: float) -> None:
        if run.start == run.stop:
            return
        copy = None if shard.copy is None else shard.copy[run]
        fused.adamw(
            shard.values[run], shard.gradient[run], shard.first_moment[run], shard.second_moment[run],
            learning_rate, *self.betas, self.epsilon, decay, self.steps, gradient_scale, copy,
        )  # fmt: skip


@dataclass
class LossScale:
    """The factor of the loss that keeps float16 gradients from vanishing (Micikevicius 2018, arXiv 1710.03740).

    It halves when a gradient overflows, and doubles after `patience` steps without. A `value` of 1 and no `patience` is
    no scaling.
    """

    value: float = 1.0
    patience: int = 0
    good_steps: int = 0

    def update(self, finite: bool) -> bool:
        """Take in whether the gradients were finite; returns whether the step is to be taken."""
        if not self.patience:
            return True
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.good_steps % self.patience == 0:
            self.value *= 2
        return finite


def learning_rate(step: int, peak: float, warmup: int, steps: int, floor: float = 0.1) -> float:
    """Return the rate of a step: linear to `peak` over `warmup` steps, then a cosine to `floor`·peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def clip_scale(norm: float, limit: float) -> float:
    """Return the factor that brings gradients of this norm to at most `limit`; a limit of 0 means none."""
    return limit / norm if limit and norm > limit else 1.0
