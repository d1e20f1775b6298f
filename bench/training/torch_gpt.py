"""The model of parallel/nn/gpt.py as a user of PyTorch would write it, and how it takes the same first weights."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from parallel.nn import GPT, GPTConfiguration


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.packed = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.size)  # as many heads as this rank has of them
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.packed(x).chunk(3, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(y.transpose(1, 2).flatten(2))


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


class Stage(nn.Module):
    """A run of a model's blocks; the first has the embeddings too, and the last the head, whose weight is a copy of its own.

    Its parameters have the names that they have in the model.
    """

    def __init__(self, model: TorchGPT, blocks: range) -> None:
        super().__init__()
        self.first, self.last = blocks.start == 0, blocks.stop == len(model.blocks)
        if self.first or self.last:
            self.token_embedding = model.token_embedding
        if self.first:
            self.position_embedding = model.position_embedding
        self.blocks = nn.ModuleDict({str(number): model.blocks[number] for number in blocks})
        if self.last:
            self.final_norm = model.final_norm

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens, or what the stage before made, to what the next one takes, or logits."""
        if self.first:
            x = self.token_embedding(x) + self.position_embedding.weight[: x.shape[1]]
        for block in self.blocks.values():
            x = block(x)
        return F.linear(self.final_norm(x), self.token_embedding.weight) if self.last else x


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


def parameter_groups(
    parts: Iterable[nn.Module], shape: GPTConfiguration, weight_decay: float
) -> list[dict[str, object]]:
    """Those that decay in ours, and the others; DTensors apart, since fused kernels take no mixture."""
    decays = {name for name, parameter in GPT(shape).named_parameters() if parameter.decay}
    groups: dict[tuple[bool, type], list[nn.Parameter]] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            groups.setdefault((name in decays, type(parameter.data)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
        for (decay, _), parameters in sorted(groups.items(), key=lambda group: not group[0][0])
    ]
