"""The layers of a transformer; what they compute is a row of the table of operations each.

Layers that are given an `axis` are cut among its ranks as in Megatron-LM (Shoeybi 2019, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from parallel.autograd import Array, Tensor, across, vjps
from parallel.nn.module import Module, Parameter

if TYPE_CHECKING:
    from collectives import Communicator
    from parallel.axis import Axis, Cut


def initial_deviation(width: int) -> float:
    """Return the deviation of first weights for a stream of this width (Nguyen 2019, arXiv 1910.05895).

    At GPT-2's width of 768 it is 0.023, close to the fixed 0.02 used there, which is too small when narrow.
    """
    return math.sqrt(2 / (5 * width))


def enter(x: Tensor, axis: Axis | None, cut: Cut | None = None) -> Tensor:
    """Return x for layers that are cut: every rank has all of it, and makes a part of its gradient."""
    if axis is None:
        return x
    return (across.gather_sequence if axis.sequence else across.copy_to_ranks)(x, axis=axis, cut=cut)


def leave(x: Tensor, axis: Axis | None, cut: Cut | None = None) -> Tensor:
    """Return the sum of what the ranks made, the parts of which are `x`: whole, or each rank its positions of it."""
    if axis is None:
        return x
    return (across.scatter_sequence if axis.sequence else across.sum_over_ranks)(x, axis=axis, cut=cut)


def summing(axis: Axis | None) -> Axis | None:
    """The axis, where operations add up the gradients of parameters over it themselves: with exact sums."""
    return axis if axis is not None and axis.exact else None


def copied(axis: Axis | None) -> bool:
    """Whether every rank makes a part only of the gradient of what is used between the layers that are cut."""
    return axis is not None and axis.sequence and not axis.exact


class Linear(Module):
    """y = x·Wᵀ + b with W of shape (outputs, inputs)."""

    def __init__(self, inputs: int, outputs: int, deviation: float | None = None) -> None:
        deviation = initial_deviation(inputs) if deviation is None else deviation
        self.weight = Parameter((outputs, inputs), deviation=deviation, decay=True)
        self.bias = Parameter((outputs,))

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        return vjps.linear(x, self.weight, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs); the bias is left to whoever reads the result."""
        return vjps.project(x, self.weight)


class ColumnParallelLinear(Module):
    """A linear layer of which every rank has a run of the outputs; `pieces` of them that stay together."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, pieces: int | None = None) -> None:
        self.axis, self.cut = axis, axis.cut(outputs, pieces)
        self.weight = Parameter(
            (outputs, inputs), deviation=initial_deviation(inputs), decay=True, cut=self.cut.elements
        )
        self.bias = Parameter((outputs,), cut=self.cut.elements)

    def forward(self, x: Tensor) -> Tensor:
        """Map (samples, positions, inputs), as it is between layers that are cut, to this rank's outputs of all positions."""
        return vjps.linear(enter(x, self.axis, self.cut), self.weight, self.bias, tiles=self._tiles())

    def without_bias(self, x: Tensor) -> Tensor:
        """As `forward`; the bias is left to whoever reads the result."""
        return vjps.project(enter(x, self.axis, self.cut), self.weight, tiles=self._tiles())

    def _tiles(self) -> Cut | None:
        return self.cut if self.axis.exact else None


class RowParallelLinear(Module):
    """A linear layer of which every rank has a run of the inputs; `pieces` of them that stay together."""

    def __init__(
        self, inputs: int, outputs: int, axis: Axis, pieces: int | None = None, deviation: float | None = None
    ) -> None:
        self.axis, self.cut = axis, axis.cut(inputs, pieces)
        deviation = initial_deviation(inputs) if deviation is None else deviation
        self.weight = Parameter((outputs, inputs), deviation=deviation, decay=True, cut=self.cut.elements, dimension=1)
        self.bias = Parameter((outputs,), copied=copied(axis))

    def forward(self, x: Tensor) -> Tensor:
        """Map this rank's inputs of all positions to (samples, positions, outputs), as it is between layers that are cut."""
        if self.axis.exact:
            whole = leave(vjps.project(x, self.weight, tiles=self.cut), self.axis, self.cut)
        else:
            whole = across.project_and_sum(x, self.weight, axis=self.axis)
        # Added once, by whoever has the sum: every rank would add it otherwise.
        return vjps.add(whole, self.bias, axis=summing(self.axis))


class Embedding(Module):
    """A learned vector of `width` numbers for each of `rows` integers; with an `axis`, every rank has a run of the rows."""

    def __init__(self, rows: int, width: int, axis: Axis | None = None, copy_of: str = "") -> None:
        self.axis, self.cut = axis, axis.cut(rows) if axis is not None else None
        self.weight = Parameter(
            (rows, width),
            deviation=initial_deviation(width),
            cut=None if self.cut is None else self.cut.elements,
            copy_of=copy_of,
        )

    def forward(self, tokens: Array) -> Tensor:
        """Map integers (samples, positions) to vectors (samples, positions, width), as they are between layers that are cut."""
        if self.axis is None or self.cut is None:
            return vjps.embedding(self.weight, tokens=tokens)
        first, in_order = self.cut.elements.start, self.axis.exact
        # No cut: a token's vector is all in one rank's part, so that no order of the sum makes a difference.
        return leave(vjps.embedding(self.weight, tokens=tokens, first=first, in_order=in_order), self.axis)


class PositionEmbedding(Module):
    """A learned vector of `width` numbers for each of `rows` positions, which every rank has whole."""

    def __init__(self, rows: int, width: int, axis: Axis | None = None) -> None:
        self.weight = Parameter(
            (rows, width), deviation=initial_deviation(width), copied=axis is not None and axis.sequence
        )
        self.axis = axis

    def forward(self, positions: Array) -> Tensor:
        """Map integers (positions) to vectors (positions, width)."""
        return vjps.embedding(self.weight, tokens=positions, in_order=summing(self.axis) is not None)


class LayerNorm(Module):
    """Normalise the last axis to mean 0 and variance 1, then scale and shift it."""

    def __init__(self, width: int, axis: Axis | None = None) -> None:
        self.weight = Parameter((width,), mean=1.0, copied=copied(axis))
        self.bias = Parameter((width,), copied=copied(axis))
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, width) to the same shape."""
        return vjps.layer_norm(x, self.weight, self.bias, axis=summing(self.axis))


class CausalSelfAttention(Module):
    """Attention of each position to itself and earlier ones, by `heads` heads in `groups` groups (each its own by default).

    The heads of a group share keys and values (Ainslie 2023, arXiv 2305.13245). The rows of the packed projection are
    ordered group, (queries of the group's heads, key, value), element: a run of rows is a run of groups, and with an `axis`
    every rank has one. With `context` sequences are shared among its ranks.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        output_deviation: float,
        groups: int | None = None,
        axis: Axis | None = None,
        context: Communicator | None = None,
    ) -> None:
        groups = heads if groups is None else groups
        if width % heads:
            raise ValueError(f"attention: {heads} heads do not divide a width of {width}")
        if groups < 1 or heads % groups:
            raise ValueError(f"attention: groups must divide heads, but {heads} is no multiple of {groups}")
        packed = width + 2 * groups * (width // heads)
        self.packed: Module
        self.output: Module
        if axis is None:
            self.groups = groups
            self.packed = Linear(width, packed)
            self.output = Linear(width, width, output_deviation)
        else:
            self.groups = len(axis.cut(width, groups).run)
            self.packed = ColumnParallelLinear(width, packed, axis, groups)
            self.output = RowParallelLinear(width, width, axis, groups, output_deviation)
        self.heads = self.groups * (heads // groups)
        self.context = context

    def forward(self, x: Tensor, sequence: int) -> Tensor:
        """Map (sequences, positions, width) to the same shape; `sequence`: the length, of which ranks may have a part each."""
        packed, heads = self.packed(x), {"heads": self.heads, "groups": self.groups}
        if self.context is None:
            attended = vjps.causal_attention(packed, **heads)
        else:
            attended = vjps.ring_attention(packed, axis=self.context, sequence=sequence, **heads)
        mixed: Tensor = self.output(attended)
        return mixed


class FeedForward(Module):
    """Linear to four times the width, GELU, and linear back."""

    def __init__(self, width: int, output_deviation: float, axis: Axis | None = None) -> None:
        self.up: Linear | ColumnParallelLinear
        self.down: Linear | RowParallelLinear
        if axis is None:
            self.up = Linear(width, 4 * width)
            self.down = Linear(4 * width, width, output_deviation)
        else:
            self.up = ColumnParallelLinear(width, 4 * width, axis)
            self.down = RowParallelLinear(4 * width, width, axis, deviation=output_deviation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, width) to the same shape."""
        # The bias of the first layer is added by the kernel that reads its result anyway.
        result: Tensor = self.down(vjps.gelu(self.up.without_bias(x), self.up.bias))
        return result
