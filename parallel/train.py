"""Training a GPT on bytes: the steps that every rank takes together."""

from __future__ import annotations

import ctypes
import hashlib
import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from collectives import ReduceOp
from kernels import fused
from parallel.autograd import Array, SavedBytes, no_gradient
from parallel.axis import Axis
from parallel.checkpoint import CheckpointError, Piece, load
from parallel.configuration import TrainingConfiguration
from parallel.data_parallel import DataParallel, sum_numbers
from parallel.exact import exact_sum, order_free_sum
from parallel.formulas import share, zigzag
from parallel.mesh import Mesh
from parallel.nn import GPT, Draws, GPTConfiguration
from parallel.optim import AdamW, LossScale, clip_scale, learning_rate
from parallel.pipeline import MicroBatch, Pipeline, measure_head
from parallel.random import uniform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collectives import Communicator
    from parallel.data import Corpus
    from parallel.nn import Parameter
    from parallel.timeline import Timeline


_SMALLEST_LOSS_SCALE = 2.0**-24


class DivergenceError(ArithmeticError):
    """The loss is no number any more."""


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
        self.mesh = mesh = Mesh(communicator, dp=c.dp(communicator.size), pp=c.pp, cp=c.cp, tp=c.tp)
        self.axis = Axis(mesh.tp, sequence=c.sequence_parallel, exact=c.exact) if c.tp > 1 or c.exact else None
        self.shape = GPTConfiguration(c.layers, c.hidden, c.heads, c.seq, dropout=c.dropout, groups=c.kv_heads)
        schedule = c.pipeline(mesh.dp.size)
        self.extents = c.extents(len(schedule.places), self._head_cost())
        mine = [number for number, (rank, _) in enumerate(schedule.places) if rank == mesh.pp.rank]
        models = [self.stage(number) for number in sorted(mine, key=lambda number: schedule.places[number][1])]
        self.replica = DataParallel(models, mesh.axis("dp", "cp"), c.sharding, c.seed, self.axis, timeline)
        ends = {schedule.places[0][0], schedule.places[-1][0]}
        self.tied = mesh.axis("pp").split(0 if mesh.pp.rank in ends else None, mesh.pp.rank)
        self.activations = SavedBytes()
        self.pipeline = Pipeline(
            schedule, self.replica, mesh.pp, self.axis, c.sharding.compute, self.activations, timeline
        )
        self.optimizer = AdamW([unit.shard for unit in self.replica.units], weight_decay=c.weight_decay)
        self.loss_scale = LossScale(2.0**16, 1000) if c.dtype == "float16" else LossScale()
        self.steps = self.first = self.skipped = 0
        self.restored = False

    def stage(self, number: int) -> GPT:
        """Return a stage of the model, without values."""
        context = self.mesh.cp if self.mesh.cp.size > 1 else None
        return GPT(self.shape, self.extents[number], self.axis, context)

    @property
    def parameter_count(self) -> int:
        """How many parameters the whole model has."""
        return GPT(self.shape).parameter_count()

    @property
    def positions(self) -> int:
        """How many positions of each sequence this rank has in layers that are cut."""
        return sum(map(len, zigzag(self.configuration.seq, self.mesh.cp.size, self.mesh.cp.rank)))

    def samples(self, count: int) -> range:
        """Return which of `count` samples are this rank's: a run of ⌈count/dp⌉ or ⌊count/dp⌋."""
        return share(count, self.mesh.dp.size, self.mesh.dp.rank)

    def step(self) -> Step:
        """Take one optimizer step on the next global batch; every rank returns the same loss.

        The loss is the mean over all tokens of the global batch: every rank weights its tokens by 1 / (tokens of the global
        batch), so that the sum over ranks and micro-batches is the mean exactly, with uneven shares as well. Raises
        DivergenceError, on every rank, if it is not finite. With ZeRO-1 and 2 the new parameters are still being gathered when it
        returns: `replica.settle()` waits for them, which a rank must do before it leaves the job.
        """
        c, replica, number = self.configuration, self.replica, self.steps
        began, waited = time.perf_counter(), self._waited()
        parts = self._micro_batches(self._read(self.samples(c.batch)))
        losses = self.pipeline.step(parts, self.loss_scale.value / (c.batch * c.seq), number)
        replica.finish(c.batch)
        replica.add_tied(self.tied)
        losses = [loss / self.loss_scale.value for loss in losses]
        if c.exact:
            loss, squares = self._sum_exactly(losses, len(parts)), self._exact_squares()
        else:
            squares = sum(map(fused.sum_of_squares, replica.counted()))
            loss, squares = sum_numbers(self.metrics, sum(losses) if self._speaks else 0.0, squares)
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

    def _read(self, samples: range, validation: int = 0) -> Array:
        """The windows of the next step, or of so many for validation, where a stage here reads them; empty ones elsewhere."""
        c = self.configuration
        if not any(chunk.model.extent.first or chunk.model.extent.last for chunk in self.replica.chunks):
            return np.zeros((len(samples), c.seq + 1), np.uint8)
        if validation:
            return self.corpus.validation_batch(validation, samples, c.seq)
        return self.corpus.batch(c.seed, self.steps, samples, c.seq)

    def _micro_batches(self, windows: Array) -> list[MicroBatch]:
        c, first = self.configuration, self.samples(self.configuration.batch).start
        count, parts = self.pipeline.schedule.micro_batches, []
        for number in range(count):
            part = share(len(windows), count, number)
            if c.exact:
                part = range(min(number, len(windows)), min(number + 1, len(windows)))
            draws = Draws(c.seed, self.steps, first + part.start) if c.dropout else None
            sample = first + part.start if c.exact and part else None
            parts.append(MicroBatch(windows[part.start : part.stop], draws, sample))
        return parts

    @property
    def _speaks(self) -> bool:
        """Whether this rank's losses count, which all ranks of a tensor-parallel axis have alike."""
        return self.mesh.tp.rank == 0

    def _exact_squares(self) -> float:
        """The squared norm of the gradients, with bits that do not depend on the layout."""

        def largest(x: float) -> float:
            return float(self.metrics.all_reduce(np.array([x]), ReduceOp.MAX)[0])

        compute = self.configuration.sharding.compute
        squares = [np.square(gradient.astype(compute), dtype=np.float64) for gradient in self.replica.counted()]
        return order_free_sum(squares, self.parameter_count, largest, self.metrics.all_reduce)

    def validate(self) -> float:
        """Return the mean loss over the validation windows, the same on every rank.

        Raises DivergenceError, on every rank, if it is not finite.
        """
        c = self.configuration
        windows = c.validation_batches * c.batch
        mine = self._read(self.samples(windows), windows)
        passes, at_once = self.evaluations(windows), self.at_once
        parts = [mine[start : start + at_once] for start in range(0, len(mine), at_once)]
        # Ranks that have run out of windows repeat one, and drop its loss: parameters may be gathered in every pass.
        losses = self.pipeline.evaluate([*parts, *[mine[:1]] * (passes - len(parts))])[: len(parts)]
        if c.exact:
            loss = self._sum_exactly(losses, passes)
        else:
            loss = sum_numbers(self.metrics, sum(losses) if self._speaks else 0.0)[0]
        return self._checked(loss / (windows * c.seq), f"the validation loss after {self.steps} steps")

    def evaluations(self, windows: int) -> int:
        """Return how many passes an evaluation takes: the same on all ranks, since parameters may be gathered in each."""
        most = len(share(windows, self.mesh.dp.size, 0))
        return -(-most // self.at_once)

    def parameters(self) -> Iterator[tuple[str, Array]]:
        """Yield name and values of every parameter, whole, on every rank; all ranks must go through all of it.

        Do not keep an array: its memory may serve for something else when the next one is asked for.
        """
        for number, (rank, chunk) in enumerate(self.pipeline.schedule.places):
            if rank == self.mesh.pp.rank:
                values = self.replica.parameters(self.replica.chunks[chunk])
            else:
                values = ((parameter, None) for parameter in self._elsewhere(number))
            for parameter, array in values:
                if parameter.copy_of:
                    continue
                dtype = self.configuration.sharding.compute
                whole = np.empty(parameter.whole_shape, dtype) if array is None else self._joined(parameter, array)
                yield parameter.name, whole if self.mesh.pp.size == 1 else self.mesh.pp.broadcast(whole, rank)

    def _elsewhere(self, number: int) -> list[Parameter]:
        """The parameters of a stage, in the order in which those who have it go through them."""
        model = self.stage(number)
        for name, parameter in model.named_parameters():
            parameter.name = name
        layouts = self.configuration.sharding.layouts(model, self.replica.group.size)
        return [slot.parameter for layout in layouts for slot in layout.slots]

    def _joined(self, parameter: Parameter, array: Array) -> Array:
        """The whole of a parameter of which tensor-parallel ranks may have a part each."""
        if parameter.shape == parameter.whole_shape:
            return to_host(array)
        whole = np.zeros(parameter.whole_shape, array.dtype)
        whole[tuple(slice(a, a + n) for a, n in zip(parameter.start, parameter.shape, strict=True))] = to_host(array)
        return self.mesh.tp.all_reduce(whole)

    def weights_sha256(self) -> str:
        """Return the digest of all weights; raises RuntimeError if the ranks' weights differ."""
        digests = {
            name: hashlib.sha256(f"{name} {data.dtype.name} {data.shape}\n".encode() + to_host(data).tobytes()).digest()
            for name, data in self.parameters()
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
                p = slot.parameter
                for prefix, array in (
                    ("", shard.values),
                    ("optimizer.first_moment/", shard.first_moment),
                    ("optimizer.second_moment/", shard.second_moment),
                ):
                    name = f"{prefix}{p.copy_of or p.name}"
                    pieces.append(Piece(name, p.whole_shape, p.start, p.shape, elements.start, array[place]))
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

    @property
    def at_once(self) -> int:
        """How many windows go together in a validation."""
        c = self.configuration
        if c.exact:
            return 1
        return max(1, c.batch // self.mesh.dp.size // c.micro_batches)

    def _sum_exactly(self, values: list[float], most: int) -> float:
        """The sum over all ranks, of at most `most` values each."""
        mine = np.zeros(most)
        if self._speaks:
            mine[: len(values)] = values
        return exact_sum(self.metrics.all_gather(mine).ravel().tolist())

    def _head_cost(self) -> float:
        """How many layers take as long as the output head, where layers are to be balanced: measured by rank 0."""
        c = self.configuration
        if c.pp == 1 or c.stage_layers:
            return 0.0
        cost = np.zeros(1)
        if self.metrics.rank == 0:
            cost[0] = measure_head(self.shape, self.at_once, c.sharding.compute)
        return float(self.metrics.broadcast(cost)[0])

    def _checked(self, loss: float, what: str) -> float:
        if not math.isfinite(loss):
            raise DivergenceError(f"{what} is {loss}; give a smaller --lr than {self.configuration.lr:g}")
        return loss

    def _waited(self) -> float:
        blocking = self.metrics, self.mesh.tp, self.mesh.cp
        return self.replica.wait_seconds + sum(sum(axis.stats.wait_seconds.values()) for axis in blocking)


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
    """Let matrix products use `threads` threads here; without threadpoolctl, as many as they like.

    Their number may decide the bits of a product: exact sums want the same one on all ranks.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(threads, user_api="blas"):
        yield
