"""AdamW, the learning-rate schedule, and clipping by the global norm, on flat buffers."""

from __future__ import annotations

import itertools
import math

from parallel.autograd import Array, array_module

# Elements updated at a time: small enough that the block's six arrays stay in a core's second-level cache.
_BLOCK = 1 << 15


class AdamW:
    """Adam with decoupled weight decay and bias correction (Loshchilov 2019, arXiv 1711.05101), in place.

    Arguments: `values` and `gradients`, flat arrays of one size; `decayed_size`, how many of the first
    elements decay; `betas`, `epsilon`, `weight_decay` as in the paper.
    """

    def __init__(
        self,
        values: Array,
        gradients: Array,
        decayed_size: int,
        betas: tuple[float, float] = (0.9, 0.95),
        epsilon: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        xp = array_module(values)
        self.values, self.gradients, self.decayed_size = values, gradients, decayed_size
        self.betas, self.epsilon, self.weight_decay = betas, epsilon, weight_decay
        self.steps = 0
        self.first_moment: Array = xp.zeros_like(values)
        self.second_moment: Array = xp.zeros_like(values)
        self._scratch: Array = xp.empty((2, min(_BLOCK, values.size)), values.dtype)

    def step(self, learning_rate: float, gradient_scale: float = 1.0) -> None:
        """Update the values once, from the gradients times `gradient_scale`."""
        self.steps += 1
        size, decayed = self.values.size, self.decayed_size
        starts = [*range(0, decayed, _BLOCK), *range(decayed, size, _BLOCK), size]
        for start, stop in itertools.pairwise(starts):
            decay = 1 - learning_rate * self.weight_decay if start < decayed else 1.0
            self._update(slice(start, stop), learning_rate, gradient_scale, decay)

    def _update(self, block: slice, learning_rate: float, gradient_scale: float, decay: float) -> None:
        xp = array_module(self.values)
        beta1, beta2 = self.betas
        value, first, second = self.values[block], self.first_moment[block], self.second_moment[block]
        gradient, scratch = self._scratch[:, : value.size]
        xp.multiply(self.gradients[block], gradient_scale, out=gradient)
        # first = β₁·first + (1 − β₁)·g and second = β₂·second + (1 − β₂)·g²
        xp.multiply(gradient, 1 - beta1, out=scratch)
        first *= beta1
        first += scratch
        gradient *= gradient
        gradient *= 1 - beta2
        second *= beta2
        second += gradient
        # value = decay·value − lr/(1 − β₁ᵗ)·first / (√(second/(1 − β₂ᵗ)) + ε)
        xp.sqrt(second, out=scratch)
        scratch *= 1 / math.sqrt(1 - beta2**self.steps)
        scratch += self.epsilon
        xp.divide(first, scratch, out=scratch)
        scratch *= learning_rate / (1 - beta1**self.steps)
        if decay != 1:
            value *= decay
        value -= scratch


def learning_rate(step: int, peak: float, warmup: int, steps: int, floor: float = 0.1) -> float:
    """Return the rate of a step: linear to `peak` over `warmup` steps, then a cosine to `floor`·peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def gradient_norm(gradients: Array) -> float:
    """Return the Euclidean norm of a flat gradient buffer."""
    xp = array_module(gradients)
    return float(
        xp.sqrt(sum(float(xp.dot(part, part)) for part in xp.split(gradients, range(_BLOCK, gradients.size, _BLOCK))))
    )


def clip_scale(norm: float, limit: float) -> float:
    """Return the factor that brings gradients of this norm to at most `limit`; a limit of 0 means none."""
    return limit / norm if limit and norm > limit else 1.0
