"""Training a GPT on bytes: the configuration, and the steps that every rank takes together."""

from __future__ import annotations

import ctypes
import hashlib
import math
import re
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.autograd import Array, SavedBytes, count_saved_bytes, no_gradient
from parallel.checkpoint import CheckpointError, Piece, load
from parallel.data_parallel import DataParallel, sum_over_ranks
from parallel.exact import exact_sum
from parallel.formulas import share
from parallel.nn import GPT, GPTConfiguration
from parallel.optim import AdamW, LossScale, clip_scale, learning_rate
from parallel.random import uniform
from parallel.sharding import Sharding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collectives import Communicator
    from parallel.data import Corpus
    from parallel.timeline import Timeline


DTYPES = ("float32", "float64", "bfloat16", "float16")


_SMALLEST_LOSS_SCALE = 2.0**-24


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
    kv_heads: int | None = None
    seq: int = 64
    batch: int = 16
    micro_batches: int = 1
    steps: int = 800
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.0
    dtype: str = "float32"
    zero: int = 0
    replicas: int = 1
    keep_parameters: bool = False
    recompute: bool = False
    exact: bool = False
    seed: int = 0
    validation_batches: int = 16

    @property
    def sharding(self) -> Sharding:
        """How the model is held and sent."""
        return Sharding(self.zero, self.dtype, self.replicas, not self.keep_parameters, self.recompute, self.exact)

    @property
    def key_width(self) -> int:
        """The width of all keys of a position, and of all values."""
        return (self.heads if self.kv_heads is None else self.kv_heads) * (self.hidden // self.heads)

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
        if not 0 <= self.dropout < 1:
            raise ConfigurationError(f"--dropout must be at least 0 and below 1, got {self.dropout}")
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"--dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, got {self.dtype}")
        if not 0 <= self.zero <= 3:
            raise ConfigurationError(f"--zero must be 0, 1, 2 or 3, got {self.zero}")
        if self.replicas < 1 or ranks % self.replicas:
            raise ConfigurationError(f"--replicas must divide the number of ranks, {ranks}, but is {self.replicas}")
        if self.replicas > 1 and self.zero == 0:
            raise ConfigurationError("--replicas is for sharded models: give --zero 1, 2 or 3 as well")
        if self.hidden % self.heads:
            raise ConfigurationError(f"--heads must divide --hidden, but {self.hidden} is no multiple of {self.heads}")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ConfigurationError(
                f"--kv-heads must divide --heads, but {self.heads} is no multiple of {self.kv_heads}"
            )
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
    """The mean loss over the global batch of a step, and this rank's seconds, in all and waiting for communication."""

    loss: float
    seconds: float
    communication_seconds: float


class Trainer:
    """One rank's part in a training.

    Arguments: `configuration` and `corpus`, the same on every rank; `communicator`, of all ranks; `timeline`, which is told
    what happens when. Collective: every method that talks to other ranks must be called by all.
    """

    def __init__(
        self,
        configuration: TrainingConfiguration,
        corpus: Corpus,
        communicator: Communicator,
        timeline: Timeline | None = None,
    ) -> None:
        c = self.configuration = configuration
        c.check(communicator.size)
        corpus.check(c.seq)
        keep_freed_memory()
        self.corpus, self.metrics, self.files = corpus, communicator.dup(), communicator.dup()
        self.model = GPT(GPTConfiguration(c.layers, c.hidden, c.heads, c.seq, dropout=c.dropout, groups=c.kv_heads))
        self.replica = DataParallel(self.model, communicator, c.sharding, c.seed, timeline)
        self.optimizer = AdamW([unit.shard for unit in self.replica.units], weight_decay=c.weight_decay)
        self.loss_scale = LossScale(2.0**16, 1000) if c.dtype == "float16" else LossScale()
        self.activations = SavedBytes()
        self.steps = self.first = self.skipped = 0
        self.restored = False

    def step(self) -> Step:
        """Take one optimizer step on the next global batch; every rank returns the same loss.

        Raises DivergenceError, on every rank, if the loss is not finite.
        """
        c, replica, number = self.configuration, self.replica, self.steps
        began, waited = time.perf_counter(), self._waited()
        samples = replica.samples(c.batch)
        windows = self.corpus.batch(c.seed, number, samples, c.seq)
        with count_saved_bytes(self.activations):
            losses = replica.accumulate(
                windows, samples.start, c.batch, c.micro_batches, c.seed, number, self.loss_scale.value
            )
        replica.finish(c.batch)
        if c.exact:
            most = len(share(c.batch, self.metrics.size, 0))
            loss, squares = self._sum_exactly(losses, most), replica.exact_squares()
        else:
            loss, squares = sum_over_ranks(self.metrics, sum(losses), replica.squares())
        loss = self._checked(loss, f"the loss at step {number + 1}")
        norm, scale = math.sqrt(squares) / self.loss_scale.value, self.loss_scale.value
        if self.loss_scale.update(math.isfinite(norm)):
            self.optimizer.step(learning_rate(number, c.lr, c.warmup, c.steps), clip_scale(norm, c.clip) / scale)
            replica.updated()
        else:
            self.skipped += 1
            if self.loss_scale.value < _SMALLEST_LOSS_SCALE:
                raise DivergenceError(
                    f"the gradients at step {number + 1} are no numbers; give a smaller --lr than {c.lr:g}"
                )
        self.steps += 1
        return Step(loss, time.perf_counter() - began, self._waited() - waited)

    def validate(self) -> float:
        """Return the mean loss over the validation windows, the same on every rank.

        Raises DivergenceError, on every rank, if it is not finite.
        """
        c = self.configuration
        windows = c.validation_batches * c.batch
        mine = self.corpus.validation_batch(windows, self.replica.samples(windows), c.seq)
        passes = self.evaluations(windows)
        losses = self.replica.evaluate(mine, 1 if c.exact else self._at_once(), passes)
        loss = self._sum_exactly(losses, passes) if c.exact else sum_over_ranks(self.metrics, sum(losses))[0]
        return self._checked(loss / (windows * c.seq), f"the validation loss after {self.steps} steps")

    def evaluations(self, windows: int) -> int:
        """Return how many passes an evaluation takes: the same on all ranks, since parameters may be gathered in each."""
        most = len(share(windows, self.metrics.size, 0))
        return most if self.configuration.exact else -(-most // self._at_once())

    def weights_sha256(self) -> str:
        """Return the digest of all weights; raises RuntimeError if the ranks' weights differ."""
        digests = {
            name: hashlib.sha256(f"{name} {data.dtype.name} {data.shape}\n".encode() + to_host(data).tobytes()).digest()
            for name, data in self.replica.parameters()
        }
        digest = hashlib.sha256(b"".join(digests[name] for name in sorted(digests)))
        everyone = self.metrics.all_gather(np.frombuffer(digest.digest(), np.uint8))
        differing = [rank for rank in range(self.metrics.size) if everyone[rank].tobytes() != digest.digest()]
        if differing:
            raise RuntimeError(
                f"rank {self.metrics.rank} and ranks {differing} hold different weights after "
                f"{self.steps} steps; a collective must have given them different results"
            )
        return digest.hexdigest()

    def pieces(self) -> list[Piece]:
        """Return what a checkpoint holds of this rank: its part of every parameter and of both moments."""
        pieces = []
        for unit in self.replica.units:
            shard = unit.shard
            for slot, elements, place in unit.layout.inside(shard.part):
                shape, name = slot.parameter.full_shape, slot.parameter.name
                for prefix, array in (
                    ("", shard.values),
                    ("optimizer.first_moment/", shard.first_moment),
                    ("optimizer.second_moment/", shard.second_moment),
                ):
                    pieces.append(
                        Piece(f"{prefix}{name}", shape, (0,) * len(shape), shape, elements.start, array[place])
                    )
        return pieces

    def metadata(self) -> dict[str, object]:
        """Return what a checkpoint must hold beside the arrays to go on as if nothing had happened."""
        return {
            "configuration": asdict(self.configuration),
            "corpus": self.corpus.digest,
            "steps": self.steps,
            "optimizer_steps": self.optimizer.steps,
            "loss_scale": asdict(self.loss_scale),
        }

    def restore(self, directory: str, step: int | None = None) -> list[str]:
        """Go on from a checkpoint, whatever the number of ranks, the stage and the dtype that it was written with.

        Before the first step; collective. Returns the settings that decide the course and are not the checkpoint's, in
        words. Raises CheckpointError, on every rank, if it is damaged, or of another model or other data.
        """
        if self.steps:
            raise ValueError(f"restore: this trainer has taken {self.steps} steps; make another one")
        mine = _with_kv_heads(asdict(self.configuration))
        differing: list[str] = []

        def check(metadata: Any) -> None:
            saved = _with_kv_heads(metadata["configuration"])
            for name in ("layers", "hidden", "heads", "kv_heads", "seq", "batch", "seed"):
                if saved[name] != mine[name]:
                    raise CheckpointError(
                        f"--{name.replace('_', '-')} is {mine[name]}, but the checkpoint in {directory} was written with {saved[name]}"
                    )
            if metadata["corpus"] != self.corpus.digest:
                raise CheckpointError(f"--data is not what the checkpoint in {directory} was trained on")
            if metadata["steps"] >= self.configuration.steps:
                raise CheckpointError(
                    f"--steps is {self.configuration.steps}, and the checkpoint in {directory} has taken "
                    f"{metadata['steps']} already; give more"
                )
            differing.extend(
                f"--{name.replace('_', '-')} {mine[name]} (was {saved[name]})"
                for name in ("steps", "lr", "warmup", "weight_decay", "clip", "dropout", "dtype", "exact")
                if saved[name] != mine[name]
            )

        self.replica.settle()
        metadata = load(directory, self.files, self.pieces(), step=step, check=check)
        self.steps = self.first = metadata["steps"]
        self.restored = True
        self.optimizer.steps = metadata["optimizer_steps"]
        if self.loss_scale.patience and metadata["loss_scale"]["patience"]:
            self.loss_scale = LossScale(**metadata["loss_scale"])
        self.replica.restored()
        return differing

    def _at_once(self) -> int:
        c = self.configuration
        return max(1, c.batch // self.metrics.size // c.micro_batches)

    def _sum_exactly(self, values: list[float], most: int) -> float:
        """The sum over all ranks, of at most `most` values each."""
        mine = np.zeros(most)
        mine[: len(values)] = values
        return exact_sum(self.metrics.all_gather(mine).ravel().tolist())

    def _checked(self, loss: float, what: str) -> float:
        if not math.isfinite(loss):
            raise DivergenceError(f"{what} is {loss}; give a smaller --lr than {self.configuration.lr:g}")
        return loss

    def _waited(self) -> float:
        return self.replica.wait_seconds + sum(self.metrics.stats.wait_seconds.values())


def _with_kv_heads(configuration: dict[str, Any]) -> dict[str, Any]:
    """With their number where it is None, or in no checkpoint of an earlier version."""
    kv_heads = configuration.get("kv_heads")
    return {**configuration, "kv_heads": configuration["heads"] if kv_heads is None else kv_heads}


def generate(
    weights: dict[str, Array], configuration: TrainingConfiguration, characters: int,
    prompt: bytes = b"def ", temperature: float = 0.8,
) -> bytes:  # fmt: skip
    """Return `prompt` and as many bytes drawn from a model with these weights, the same for the same weights and seed."""
    c = configuration
    model = GPT(GPTConfiguration(c.layers, c.hidden, c.heads, c.seq, groups=c.kv_heads))
    for name, parameter in model.named_parameters():
        parameter.data = weights[name]
    text = list(prompt)
    with no_gradient():
        for draw in uniform(c.seed, "generation", 0, characters):
            logits = model(np.asarray([text[-c.seq :]])).data[0, -1].astype(np.float64) / temperature
            cumulative = np.cumsum(np.exp(logits - logits.max()))
            text.append(min(255, int(np.searchsorted(cumulative, draw * cumulative[-1], side="right"))))
    return bytes(text)


def to_host(array: Array) -> Array:
    """Return an array of the host, in C order."""
    return np.ascontiguousarray(array if isinstance(array, np.ndarray) else array.get())


def keep_freed_memory() -> None:
    """Have the C library keep what is freed: by default each large array is mapped anew, and its pages cleared again.

    That is a sixth of a step's time. Elsewhere than with glibc nothing happens.
    """
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, (1 << 31) - 1)


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
