"""The model of parallel/nn/gpt.py as a user of PyTorch would write it, and how it takes the same first weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from parallel.nn import GPT, GPTConfiguration


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.packed = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        sequences, positions, width = x.shape
        shape = (sequences, positions, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.packed(x).split(width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class TorchGPT(nn.Module):
    """Its modules have the names of ours, and so have its parameters; called on windows it returns the mean loss."""

    def __init__(self, shape: GPTConfiguration) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.position_embedding = nn.Embedding(shape.sequence, shape.hidden)
        self.blocks = nn.ModuleList([Block(shape.hidden, shape.heads) for _ in range(shape.layers)])
        self.final_norm = nn.LayerNorm(shape.hidden)

    def forward(self, windows: Tensor) -> Tensor:
        tokens, targets = windows[:, :-1], windows[:, 1:]
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.final_norm(x), self.token_embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.reshape(-1))


def initialise(model: TorchGPT, shape: GPTConfiguration, seed: int) -> None:
    """Give the model the first weights that ours has."""
    ours = dict(GPT(shape).named_parameters())
    width, size = shape.hidden, shape.hidden // shape.heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ours[name].name = name
            values = torch.from_numpy(ours[name].initial_values(seed, 0, ours[name].size).astype(np.float32))
            if ".packed." in name:  # rows in the order (head, query | key | value); here it is the other way round
                values = values.view(shape.heads, 3, size, -1).transpose(0, 1).reshape(3 * width, -1)
            parameter.copy_(values.reshape(parameter.shape))


def parameter_groups(model: nn.Module, shape: GPTConfiguration, weight_decay: float) -> list[dict[str, object]]:
    """Those that decay in ours, and the others."""
    decays = {name for name, parameter in GPT(shape).named_parameters() if parameter.decay}
    named = list(model.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if name in decays], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in decays], "weight_decay": 0.0},
    ]
