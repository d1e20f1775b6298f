"""Prints the loss and the norm of the gradients of one batch, of our model and of torch's from the same weights."""

import json

import numpy as np
import torch

from bench.training.torch_gpt import TorchGPT, initialise, parameter_groups
from parallel.nn import GPT, FlatParameters, GPTConfiguration

SHAPE = GPTConfiguration(layers=2, hidden=24, heads=3, sequence=10, vocabulary=256)
windows = np.random.default_rng(0).integers(0, 256, (4, 11))

model = GPT(SHAPE)
flat = FlatParameters(model, "float32")
flat.initialise(7)
ours = model.loss(windows, 1 / windows[:, 1:].size)
ours.backward()

peer = TorchGPT(SHAPE)
initialise(peer, SHAPE, 7)
theirs = peer(torch.from_numpy(windows))
theirs.backward()

decayed = [sum(p.numel() for p in group["params"]) for group in parameter_groups(peer, SHAPE, 0.1)]
record = {
    "losses": [float(ours.data), theirs.item()],
    "norms": [
        [float(np.linalg.norm(flat.named[name].gradient)), float(parameter.grad.norm())]
        for name, parameter in peer.named_parameters()
    ],
    "names": [sorted(flat.named), sorted(name for name, _ in peer.named_parameters())],
    "sizes": [[flat.decayed_size, flat.size - flat.decayed_size], decayed],
}
print(json.dumps(record))
