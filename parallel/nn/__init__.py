"""Layers, and the GPT built of them."""

from parallel.nn.dropout import Draws, dropout
from parallel.nn.gpt import GPT, Block, Extent, GPTConfiguration
from parallel.nn.layers import (
    CausalSelfAttention,
    ColumnParallelLinear,
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    PositionEmbedding,
    RowParallelLinear,
)
from parallel.nn.module import Module, Parameter

__all__ = [
    "GPT",
    "Block",
    "CausalSelfAttention",
    "ColumnParallelLinear",
    "Draws",
    "Embedding",
    "Extent",
    "FeedForward",
    "GPTConfiguration",
    "LayerNorm",
    "Linear",
    "Module",
    "Parameter",
    "PositionEmbedding",
    "RowParallelLinear",
    "dropout",
]
