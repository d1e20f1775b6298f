"""Data parallelism: every rank holds the model and takes its share of the samples; gradients are summed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.autograd import Array, no_gradient
from parallel.formulas import share
from parallel.nn import GPT, FlatParameters

if TYPE_CHECKING:
    from collectives import Communicator


class DataParallel:
    """A replica of a model, whose gradients are those of the mean loss over all tokens of the global batch.

    Every rank weights its tokens by 1 / (tokens of the global batch), so that the sum over ranks is the mean
    exactly, with uneven shares as well. All gradients lie in one buffer of the communicator and cross the
    wire in one all_reduce a step, however many micro-batches were accumulated.
    """

    def __init__(self, model: GPT, communicator: Communicator, dtype: Any) -> None:
        self.model, self.communicator = model, communicator
        self.parameters = FlatParameters(model, dtype, communicator.empty)

    def samples(self, count: int) -> range:
        """Return which of `count` samples are this rank's: a run of ⌈count/ranks⌉ or ⌊count/ranks⌋."""
        return share(count, self.communicator.size, self.communicator.rank)

    def accumulate(self, windows: Array, global_tokens: int, micro_batches: int) -> float:
        """Set the gradients to those of windows (samples, sequence + 1); returns their part of the loss."""
        self.parameters.gradients.fill(0)
        total = 0.0
        for number in range(micro_batches):
            part = share(len(windows), micro_batches, number)
            loss = self.model.loss(windows[part.start : part.stop], 1 / global_tokens)
            loss.backward()
            total += float(loss.data)
        return total

    def evaluate(self, windows: Array, at_once: int) -> float:
        """Return the summed loss of these windows, `at_once` at a time, without any gradients."""
        with no_gradient():
            parts = [windows[start : start + at_once] for start in range(0, len(windows), at_once)]
            return sum(float(self.model.loss(part, 1.0).data) for part in parts)

    def reduce_gradients(self) -> None:
        """Sum the gradients over all ranks, in place."""
        self.communicator.all_reduce(self.parameters.gradients)


def sum_over_ranks(communicator: Communicator, value: float) -> float:
    """Return the sum of one number of every rank, in float64 and with the same bits on all of them."""
    return float(communicator.all_reduce(np.array([value], np.float64))[0])
