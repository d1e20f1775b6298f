"""The layers of a transformer; what they compute is a row of the table of operations each."""

from __future__ import annotations

import math

from parallel.autograd import Array, Tensor, vjps
from parallel.nn.module import Module, Parameter


def initial_deviation(width: int) -> float:
    """Return the deviation of first weights for a stream of this width (Nguyen 2019, arXiv 1910.05895).

    At GPT-2's width of 768 it is 0.023, close to the fixed 0.02 used there, which is too small when narrow.
    """
    return math.sqrt(2 / (5 * width))


class Linear(Module):
    """y = x·Wᵀ + b with W of shape (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, deviation: float | None = None) -> None:
        deviation = initial_deviation(inputs) if deviation is None else deviation
        self.weight = Parameter((outputs, inputs), deviation=deviation, decay=True)
        self.bias = Parameter((outputs,))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        return vjps.linear(x, self.weight, self.bias)


class Embedding(Module):
    """A learned vector of `width` numbers for each of `rows` integers."""

    def __init__(self, rows: int, width: int) -> None:
        self.weight = Parameter((rows, width), deviation=initial_deviation(width))

    def forward(self, tokens: Array) -> Tensor:
        """Map integers (…) to vectors (…, width)."""
        return vjps.embedding(self.weight, tokens=tokens)


class LayerNorm(Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift it."""

    def __init__(self, width: int) -> None:
        self.weight = Parameter((width,), mean=1.0)
        self.bias = Parameter((width,))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, width) to the same shape."""
        return vjps.layer_norm(x, self.weight, self.bias)


class CausalSelfAttention(Module):
    """Attention of each position to itself and earlier ones, by `heads` heads in `groups` groups (each its own by default).

    The heads of a group share keys and values (Ainslie 2023, arXiv 2305.13245). The rows of the packed projection are
    ordered group, (queries of the group's heads, key, value), element: a run of rows is a run of groups.
    """

    def __init__(self, width: int, heads: int, output_deviation: float, groups: int | None = None) -> None:
        if width % heads:
            raise ValueError(f"attention: {heads} heads do not divide a width of {width}")
        self.heads, self.groups = heads, heads if groups is None else groups
        if self.groups < 1 or heads % self.groups:
            raise ValueError(f"attention: groups must divide heads, but {heads} is no multiple of {groups}")
        self.packed = Linear(width, width + 2 * self.groups * (width // heads))
        self.output = Linear(width, width, output_deviation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (sequences, positions, width) to the same shape."""
        attended = vjps.causal_attention(self.packed(x), heads=self.heads, groups=self.groups)
        mixed: Tensor = self.output(attended)
        return mixed


class FeedForward(Module):
    """Linear to four times the width, GELU, and linear back."""

    def __init__(self, width: int, output_deviation: float) -> None:
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width, output_deviation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, width) to the same shape."""
        # The bias of the first layer is added by the kernel that reads its result anyway.
        result: Tensor = self.down(vjps.gelu(vjps.project(x, self.up.weight), self.up.bias))
        return result
