"""Who trains: this library in each of its modes, and PyTorch in each of its own."""

from __future__ import annotations

from typing import Final

from bench.harness import contestants as harness
from bench.training import ours
from bench.training.learner import Contestant

TORCH: Final = ("torch", "ddp", "fsdp2")
ALONE: Final = ("alone", "torch")
"""Those that train on one rank, whatever number of ranks the others have."""


def names() -> list[str]:
    """Every contestant, ours first."""
    return ["alone", *ours.MODES, *TORCH]


def join(name: str, store: str) -> Contestant:
    """Join the other ranks of the job; raises Unavailable with the reason where that cannot be.

    `store` is a path in a folder that they share, for Gloo.
    """
    if name not in TORCH:
        return ours.join(name)
    joined = harness.join("gloo", store, crowded=False)
    from bench.training import torch_learner  # torch is here, as it joined

    return Contestant(joined.description, joined.barrier, torch_learner.BUILD[name])
