"""Layers, and the GPT built of them."""

from parallel.nn.dropout import Draws, dropout
from parallel.nn.gpt import GPT, Block, GPTConfiguration
from parallel.nn.layers import CausalSelfAttention, Embedding, FeedForward, LayerNorm, Linear
from parallel.nn.module import Module, Parameter

__all__ = [
    "GPT",
    "Block",
    "CausalSelfAttention",
    "Draws",
    "Embedding",
    "FeedForward",
    "GPTConfiguration",
    "LayerNorm",
    "Linear",
    "Module",
    "Parameter",
    "dropout",
]
