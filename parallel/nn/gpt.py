"""GPT: a decoder-only transformer with layer normalisation before each part (Radford 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from parallel.autograd import Array, Tensor, across, array_module, attention, vjps
from parallel.nn.dropout import Draws, dropout
from parallel.nn.layers import (
    CausalSelfAttention,
    Embedding,
    FeedForward,
    LayerNorm,
    PositionEmbedding,
    enter,
    initial_deviation,
    summing,
)
from parallel.nn.module import Module

if TYPE_CHECKING:
    from collectives import Communicator
    from parallel.axis import Axis


@dataclass(frozen=True)
class GPTConfiguration:
    """The shape of a GPT: layers, width, heads (which divide the width), longest sequence, and vocabulary.

    `dropout`: the probability with which elements are dropped after the embeddings and both parts of a layer. `groups`:
    heads of keys and values, which divide the heads; as many by default.
    """

    layers: int
    hidden: int
    heads: int
    sequence: int
    vocabulary: int = 256
    dropout: float = 0.0
    groups: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "dropout" and value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.hidden % self.heads:
            raise ValueError(f"heads must divide hidden, but {self.hidden} is no multiple of {self.heads}")
        if self.groups is not None and self.heads % self.groups:
            raise ValueError(f"groups must divide heads, but {self.heads} is no multiple of {self.groups}")


@dataclass(frozen=True)
class Extent:
    """The part of a model that a pipeline's stage has: which layers, and whether the first and the last of everything else.

    `untied`: the output head has a weight of its own, a copy of the token embedding's whose gradient comes apart.
    """

    layers: range
    first: bool = True
    last: bool = True
    untied: bool = False


class Block(Module):
    """A transformer layer: attention and feed-forward, each on the normalised stream and added back to it."""

    def __init__(
        self,
        configuration: GPTConfiguration,
        number: int,
        axis: Axis | None = None,
        context: Communicator | None = None,
    ) -> None:
        c, width = configuration, configuration.hidden
        # Two residual additions a layer: with this factor the stream's variance does not grow with depth.
        deviation = initial_deviation(width) / math.sqrt(2 * c.layers)
        self.attention_norm = LayerNorm(width, axis)
        self.attention = CausalSelfAttention(width, c.heads, deviation, c.groups, axis, context)
        self.feed_forward_norm = LayerNorm(width, axis)
        self.feed_forward = FeedForward(width, deviation, axis)
        self._number, self._dropout, self._sequence = number, c.dropout, c.sequence

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Map (sequences, positions, width) to the same shape."""
        x = vjps.add(x, self._drop(self.attention(self.attention_norm(x), self._sequence), "attention", draws))
        return vjps.add(x, self._drop(self.feed_forward(self.feed_forward_norm(x)), "feed_forward", draws))

    def _drop(self, x: Tensor, part: str, draws: Draws | None) -> Tensor:
        return dropout(x, self._dropout, f"blocks.{self._number}.{part}", draws)


class GPT(Module):
    """The whole model, or a stage of it; the output head is the token embedding transposed, as in GPT-2.

    Arguments: `configuration`, of the whole; `extent`, by default everything; `axis`, the ranks among which layers are cut;
    `context`, those that share sequences, each with its `attention.positions`: sequences then have the model's length.
    """

    def __init__(
        self,
        configuration: GPTConfiguration,
        extent: Extent | None = None,
        axis: Axis | None = None,
        context: Communicator | None = None,
    ) -> None:
        c = self.configuration = configuration
        self.axis, self.context = axis, context
        self.extent = extent = extent or Extent(range(c.layers))
        self.head = None
        if extent.first:
            self.token_embedding = Embedding(c.vocabulary, c.hidden, axis)
            self.position_embedding = PositionEmbedding(c.sequence, c.hidden, axis)
        self.blocks = {number: Block(c, number, axis, context) for number in extent.layers}
        if extent.last:
            self.final_norm = LayerNorm(c.hidden, axis)
            if extent.untied or not extent.first:
                self.head = Embedding(c.vocabulary, c.hidden, axis, copy_of="token_embedding.weight")

    def forward(self, x: Array | Tensor, draws: Draws | None = None) -> Tensor:
        """Map tokens (sequences, positions), or what the stage before has made of them, to what the next one wants.

        That is (sequences, this rank's positions, width), and at the end the logits (sequences, positions, vocabulary): of this
        rank's positions where ranks share sequences, and of its run of the vocabulary where they cut layers.
        """
        length = self.configuration.sequence if isinstance(x, Tensor) else x.shape[1]
        if draws is not None and self._shares_positions:
            draws = replace(draws, positions=self.positions(length), sequence=length)
        if not isinstance(x, Tensor):
            x = self._embed(x, draws)
        for block in self.blocks.values():
            x = block(x, draws)
        return self._logits(x) if self.extent.last else x

    @property
    def _shares_positions(self) -> bool:
        return self.context is not None or (self.axis is not None and self.axis.sequence)

    def positions(self, length: int) -> Array:
        """Which positions of a sequence this rank has between layers that are cut."""
        mine = np.arange(length) if self.context is None else self._of_context(length)
        own = range(len(mine)) if self.axis is None else self.axis.positions(len(mine))
        return mine[own.start : own.stop]

    def _of_context(self, length: int) -> Array:
        assert self.context is not None
        return attention.positions(length, self.context.size, self.context.rank)

    def _embed(self, tokens: Array, draws: Draws | None) -> Tensor:
        length = tokens.shape[1]
        if length > self.configuration.sequence:
            raise ValueError(f"{length} positions, but the model has {self.configuration.sequence} position embeddings")
        if self.context is not None:
            tokens = tokens[:, self._of_context(length)]
        here = array_module(tokens).asarray(self.positions(length))
        x = vjps.add(self.token_embedding(tokens), self.position_embedding(here))
        return dropout(x, self.configuration.dropout, "embedding", draws)

    def _logits(self, x: Tensor) -> Tensor:
        head = self.token_embedding if self.head is None else self.head
        tiles = head.cut if summing(self.axis) else None
        return vjps.project(enter(self.final_norm(x), self.axis, head.cut), head.weight, tiles=tiles)

    def loss(self, windows: Array, scale: float, draws: Draws | None = None, x: Tensor | None = None) -> Tensor:
        """Return `scale` times the summed loss of predicting each token of `windows` from those before it.

        `draws`: of the dropout; without, there is none, as in evaluation. `x`: what the stage before has made of the windows.
        """
        windows = windows.astype(np.int64)
        logits, targets = self(windows[:, :-1] if x is None else x, draws), windows[:, 1:]
        if self.context is not None:
            targets = targets[:, self._of_context(targets.shape[1])]
        if self.axis is None:
            return vjps.cross_entropy(logits, targets=targets, scale=scale)
        cut = (self.token_embedding if self.head is None else self.head).cut
        return across.vocabulary_cross_entropy(logits, targets=targets, scale=scale, axis=self.axis, cut=cut)
