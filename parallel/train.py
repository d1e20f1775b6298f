"""Training a GPT on bytes: the configuration, and the steps that every rank takes together."""

from __future__ import annotations

import math
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from parallel.autograd import array_module, no_gradient
from parallel.data_parallel import DataParallel, sum_over_ranks
from parallel.formulas import Memory
from parallel.nn import GPT, GPTConfiguration
from parallel.optim import AdamW, clip_scale, gradient_norm, learning_rate
from parallel.random import uniform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collectives import Communicator
    from parallel.data import Corpus


class ConfigurationError(ValueError):
    """A training that cannot be as asked; the message names the flag, what was given, and what would do."""


class DivergenceError(ArithmeticError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class TrainingConfiguration:
    """Everything that decides the result of a training, except the data."""

    layers: int = 4
    hidden: int = 128
    heads: int = 4
    seq: int = 64
    batch: int = 16
    micro_batches: int = 1
    steps: int = 800
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: Literal["float32", "float64"] = "float32"
    seed: int = 0
    validation_batches: int = 16

    def check(self, ranks: int) -> None:
        """Raise ConfigurationError unless `ranks` ranks can train so."""
        for name in (
            "layers",
            "hidden",
            "heads",
            "seq",
            "batch",
            "micro_batches",
            "steps",
            "validation_batches",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "warmup", "weight_decay", "clip", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} must be a finite number of at least 0, got {getattr(self, name)}"
                )
        if self.dtype not in ("float32", "float64"):
            raise ConfigurationError(f"--dtype must be float32 or float64, got {self.dtype}")
        if self.hidden % self.heads:
            raise ConfigurationError(f"--heads must divide --hidden, but {self.hidden} is no multiple of {self.heads}")
        if self.batch < ranks:
            raise ConfigurationError(
                f"more ranks than data: a global --batch of {self.batch} sequences leaves some of "
                f"{ranks} ranks without one"
            )
        if self.micro_batches > self.batch // ranks:
            raise ConfigurationError(
                f"--micro-batches is {self.micro_batches}, but a rank has only {self.batch // ranks} "
                f"sequences of the global --batch of {self.batch} over {ranks} ranks"
            )


def parse_layout(text: str) -> int:
    """Return the number of ranks of a layout such as dp4; raises ConfigurationError for any other text."""
    match = re.fullmatch(r"dp([1-9][0-9]*)", text)
    if match is None:
        raise ConfigurationError(f"--layout {text!r} is not known; expected dp and a number of ranks, such as dp4")
    return int(match[1])


@dataclass(frozen=True)
class Step:
    """The mean loss over the global batch of a step, and this rank's seconds, in all and in communication."""

    loss: float
    seconds: float
    communication_seconds: float


class Trainer:
    """One rank's part in a training.

    Arguments: `configuration` and `corpus`, the same on every rank; `gradients`, the communicator that the
    gradients cross; `metrics`, another of the same ranks for losses, so that the bytes of the two are counted
    apart.
    """

    def __init__(
        self,
        configuration: TrainingConfiguration,
        corpus: Corpus,
        gradients: Communicator,
        metrics: Communicator,
    ) -> None:
        c = self.configuration = configuration
        c.check(gradients.size)
        corpus.check(c.seq)
        self.corpus, self.metrics = corpus, metrics
        self.model = GPT(GPTConfiguration(c.layers, c.hidden, c.heads, c.seq))
        self.replica = DataParallel(self.model, gradients, c.dtype)
        self.parameters = self.replica.parameters
        self.parameters.initialise(c.seed)
        self.optimizer = AdamW(
            self.parameters.values,
            self.parameters.gradients,
            self.parameters.decayed_size,
            weight_decay=c.weight_decay,
        )

    def step(self) -> Step:
        """Take one optimizer step on the next global batch; every rank returns the same loss.

        Raises DivergenceError, on every rank, if the loss is not finite.
        """
        c, replica, number = self.configuration, self.replica, self.optimizer.steps
        began, waited = time.perf_counter(), self._waited()
        windows = self.corpus.batch(c.seed, number, replica.samples(c.batch), c.seq)
        loss = replica.accumulate(windows, c.batch * c.seq, c.micro_batches)
        replica.reduce_gradients()
        loss = self._checked(sum_over_ranks(self.metrics, loss), f"the loss at step {number + 1}")
        scale = clip_scale(gradient_norm(self.parameters.gradients), c.clip)
        self.optimizer.step(learning_rate(number, c.lr, c.warmup, c.steps), scale)
        return Step(loss, time.perf_counter() - began, self._waited() - waited)

    def validate(self) -> float:
        """Return the mean loss over the validation windows, the same on every rank.

        Raises DivergenceError, on every rank, if it is not finite.
        """
        c = self.configuration
        windows = c.validation_batches * c.batch
        mine = self.corpus.validation_batch(windows, self.replica.samples(windows), c.seq)
        at_once = max(1, c.batch // self.metrics.size // c.micro_batches)
        loss = sum_over_ranks(self.metrics, self.replica.evaluate(mine, at_once)) / (windows * c.seq)
        return self._checked(loss, f"the validation loss after {self.optimizer.steps} steps")

    def weights_sha256(self) -> str:
        """Return the digest of all weights; raises RuntimeError if the ranks' weights differ."""
        digest = self.parameters.sha256()
        everyone = self.metrics.all_gather(np.frombuffer(bytes.fromhex(digest), np.uint8))
        differing = [rank for rank in range(self.metrics.size) if everyone[rank].tobytes().hex() != digest]
        if differing:
            raise RuntimeError(
                f"rank {self.metrics.rank} and ranks {differing} hold different weights after "
                f"{self.optimizer.steps} steps; an all_reduce must have given them different results"
            )
        return digest

    def memory(self) -> Memory:
        """Return the bytes of the arrays that this rank holds."""
        optimizer = self.optimizer.first_moment.nbytes + self.optimizer.second_moment.nbytes
        return Memory(self.parameters.values.nbytes, self.parameters.gradients.nbytes, optimizer)

    def generate(self, characters: int, prompt: bytes = b"def ", temperature: float = 0.8) -> bytes:
        """Return `prompt` and as many bytes drawn from the model, the same for the same weights and seed."""
        text, xp = list(prompt), array_module(self.parameters.values)
        draws = uniform(self.configuration.seed, "generation", 0, characters)
        with no_gradient():
            for draw in draws:
                window = xp.asarray([text[-self.configuration.seq :]])
                logits = self.model(window).data[0, -1].astype(xp.float64) / temperature
                cumulative = xp.cumsum(xp.exp(logits - logits.max()))
                text.append(min(255, int(xp.searchsorted(cumulative, draw * cumulative[-1], side="right"))))
        return bytes(text)

    def _checked(self, loss: float, what: str) -> float:
        if not math.isfinite(loss):
            raise DivergenceError(f"{what} is {loss}; give a smaller --lr than {self.configuration.lr:g}")
        return loss

    def _waited(self) -> float:
        axes = (self.replica.communicator, self.metrics)
        return sum(sum(axis.stats.wait_seconds.values()) for axis in axes)


@contextmanager
def blas_threads(threads: int) -> Iterator[None]:
    """Let matrix products use `threads` threads here; without threadpoolctl, as many as they like."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(threads, user_api="blas"):
        yield
