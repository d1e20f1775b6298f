"""GPT: a decoder-only transformer with layer normalisation before each part (Radford 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from parallel.autograd import Array, Tensor, array_module, vjps
from parallel.nn.dropout import Draws, dropout
from parallel.nn.layers import CausalSelfAttention, Embedding, FeedForward, LayerNorm, initial_deviation
from parallel.nn.module import Module


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


class Block(Module):
    """A transformer layer: attention and feed-forward, each on the normalised stream and added back to it."""

    def __init__(self, configuration: GPTConfiguration, number: int) -> None:
        width = configuration.hidden
        # Two residual additions a layer: with this factor the stream's variance does not grow with depth.
        deviation = initial_deviation(width) / math.sqrt(2 * configuration.layers)
        self.attention_norm = LayerNorm(width)
        self.attention = CausalSelfAttention(width, configuration.heads, deviation, configuration.groups)
        self.feed_forward_norm = LayerNorm(width)
        self.feed_forward = FeedForward(width, deviation)
        self._number, self._dropout = number, configuration.dropout

    def forward(self, x: Tensor, draws: Draws | None = None) -> Tensor:
        """Map (sequences, positions, width) to the same shape."""
        x = vjps.add(x, self._drop(self.attention(self.attention_norm(x)), "attention", draws))
        return vjps.add(x, self._drop(self.feed_forward(self.feed_forward_norm(x)), "feed_forward", draws))

    def _drop(self, x: Tensor, part: str, draws: Draws | None) -> Tensor:
        return dropout(x, self._dropout, f"blocks.{self._number}.{part}", draws)


class GPT(Module):
    """The whole model; the output head is the token embedding transposed, as in GPT-2."""

    def __init__(self, configuration: GPTConfiguration) -> None:
        c = self.configuration = configuration
        self.token_embedding = Embedding(c.vocabulary, c.hidden)
        self.position_embedding = Embedding(c.sequence, c.hidden)
        self.blocks = [Block(c, number) for number in range(c.layers)]
        self.final_norm = LayerNorm(c.hidden)

    def forward(self, tokens: Array, draws: Draws | None = None) -> Tensor:
        """Map tokens (sequences, positions) to logits (sequences, positions, vocabulary)."""
        positions = tokens.shape[1]
        if positions > self.configuration.sequence:
            raise ValueError(
                f"{positions} positions, but the model has {self.configuration.sequence} position embeddings"
            )
        xp = array_module(tokens)
        x = vjps.add(self.token_embedding(tokens), self.position_embedding(xp.arange(positions)))
        x = dropout(x, self.configuration.dropout, "embedding", draws)
        for block in self.blocks:
            x = block(x, draws)
        return vjps.project(self.final_norm(x), self.token_embedding.weight)

    def loss(self, windows: Array, scale: float, draws: Draws | None = None) -> Tensor:
        """Return `scale` times the summed loss of predicting each token of `windows` from those before it.

        `draws`: of the dropout; without, there is none, as in evaluation.
        """
        windows = windows.astype(np.int64)
        return vjps.cross_entropy(self(windows[:, :-1], draws), targets=windows[:, 1:], scale=scale)
