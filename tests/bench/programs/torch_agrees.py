"""Prints the loss and the norm of the gradients of one batch, of our model and of torch's from the same weights."""

import json

import numpy as np
import torch

from bench.training.torch_gpt import TorchGPT, initialise, parameter_groups
from parallel.nn import GPT, GPTConfiguration

SHAPE = GPTConfiguration(layers=2, hidden=24, heads=3, sequence=10, vocabulary=256)
windows = np.random.default_rng(0).integers(0, 256, (4, 11))

model = GPT(SHAPE)
named = dict(model.named_parameters())
for name, parameter in named.items():
    parameter.name = name
    parameter.data = parameter.initial_values(7, 0, parameter.size).astype(np.float32).reshape(parameter.shape)
ours = model.loss(windows, 1 / windows[:, 1:].size)
ours.backward()

peer = TorchGPT(SHAPE)
initialise(peer, SHAPE, 7)
theirs = peer(torch.from_numpy(windows))
theirs.backward()

decayed = [sum(p.numel() for p in group["params"]) for group in parameter_groups([peer], SHAPE, 0.1)]
record = {
    "losses": [float(ours.data), theirs.item()],
    "norms": [
        [float(np.linalg.norm(named[name].gradient)), float(parameter.grad.norm())]
        for name, parameter in peer.named_parameters()
    ],
    "names": [sorted(named), sorted(name for name, _ in peer.named_parameters())],
    "sizes": [[sum(p.size for p in named.values() if p.decay is kind) for kind in (True, False)], decayed],
}
print(json.dumps(record))
