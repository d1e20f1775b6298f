"""PyTorch's ways to train, by the name of the contestant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from bench.training.learner import Learner
from bench.training.torch_learner import DDP, FSDP2, Alone
from bench.training.torch_pipeline import SCHEDULES, Pipeline
from bench.training.torch_tensor import TensorParallel
from parallel.configuration import TrainingConfiguration
from parallel.data import Corpus

Kind = Callable[[TrainingConfiguration, Corpus], Alone]


def _build(kind: Kind, configuration: TrainingConfiguration, corpus: Corpus) -> Learner:
    made = kind(configuration, corpus)
    return Learner(made.step, made.hush)


_KINDS: Final[dict[str, Kind]] = {
    "torch": Alone,
    "ddp": DDP,
    "fsdp2": FSDP2,
    "torch-tp": TensorParallel,
    **{f"torch-{name}": partial(Pipeline, *how) for name, how in SCHEDULES.items()},
}
BUILD: Final = {name: partial(_build, kind) for name, kind in _KINDS.items()}
"""Contestant -> what makes a rank of it, from the configuration and the corpus."""
