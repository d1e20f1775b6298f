"""What the tests of layouts train: a small model on a small text, on ranks that are threads, with every number compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from collectives import Communicator
from collectives.testing import run_ranks
from parallel import accounting
from parallel.configuration import TrainingConfiguration
from parallel.data import Corpus
from parallel.formulas import Memory
from parallel.schedules import expected_in_flight
from parallel.train import Trainer

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 40, np.uint8)
CORPUS = Corpus(TEXT[:1500], TEXT[1500:], 1)


@dataclass(frozen=True)
class Run:
    """What one rank ends with."""

    losses: list[float]
    validation: float
    weights: dict[str, np.ndarray]
    digest: str
    sent: dict[str, int]
    expected: dict[str, int]
    memory: Memory
    predicted: Memory
    in_flight: tuple[int, int]


def run_of(trainer: Trainer, steps: int) -> Run:
    """Take the steps, and validate once."""
    losses = [trainer.step().loss for _ in range(steps)]
    validation = trainer.validate()
    sent, expected = accounting.traffic(trainer), accounting.expected_traffic(trainer, 1)
    memory, predicted = accounting.memory(trainer), accounting.expected_memory(trainer)
    weights = {name: array.copy() for name, array in trainer.parameters()}
    pipeline, schedule = trainer.pipeline, trainer.pipeline.schedule
    most = expected_in_flight(
        schedule.name, schedule.ranks, trainer.mesh.pp.rank, schedule.micro_batches, schedule.chunks
    )
    return Run(
        losses, validation, weights, trainer.weights_sha256(), sent, expected, memory, predicted,
        (pipeline.most_in_flight, most),
    )  # fmt: skip


def train(ranks: int, chosen: TrainingConfiguration, steps: int) -> list[Run]:
    """Train on so many ranks."""

    def rank(world: Communicator) -> Run:
        return run_of(Trainer(chosen, CORPUS, world), steps)

    return run_ranks(ranks, rank)


def go_on(ranks: int, chosen: TrainingConfiguration, folder: Path, steps: int) -> list[list[float]]:
    """The losses on every rank of so many steps after the latest checkpoint; what is sent must be as predicted here too."""

    def rank(world: Communicator) -> list[float]:
        trainer = Trainer(chosen, CORPUS, world)
        trainer.restore(str(folder))
        losses = [trainer.step().loss for _ in range(steps)]
        trainer.validate()
        assert accounting.traffic(trainer) == accounting.expected_traffic(trainer, 1)
        return losses

    return run_ranks(ranks, rank)


def check_numbers(runs: list[Run]) -> None:
    """What was measured is what the formulas say, as integers, and all ranks agree."""
    assert len({run.digest for run in runs}) == 1
    for run in runs:
        assert run.losses == runs[0].losses
        assert run.sent == run.expected
        assert run.in_flight[0] == run.in_flight[1]
        assert run.memory == run.predicted


def configuration(dtype: str = "float32", batch: int = 6, **others: Any) -> TrainingConfiguration:
    """A small one; `others` override."""
    return TrainingConfiguration(
        **{
            "layers": 3, "hidden": 16, "heads": 2, "seq": 12, "batch": batch, "steps": 5, "lr": 3e-3, "warmup": 2,
            "dtype": dtype, "validation_batches": 2, **others,
        }
    )  # fmt: skip
