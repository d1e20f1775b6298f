"""Layers, and the GPT built of them."""

from parallel.nn.gpt import GPT, Block, GPTConfiguration
from parallel.nn.layers import CausalSelfAttention, Embedding, FeedForward, LayerNorm, Linear
from parallel.nn.module import FlatParameters, Module, Parameter

__all__ = [
    "GPT",
    "Block",
    "CausalSelfAttention",
    "Embedding",
    "FeedForward",
    "FlatParameters",
    "GPTConfiguration",
    "LayerNorm",
    "Linear",
    "Module",
    "Parameter",
]
