"""The training job: what all ranks do from the first check to the last line of output."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import resource
import sys
import time
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from collectives import Communicator
from collectives.select import LARGE_MESSAGE
from parallel.data import Corpus, DataError, load, unigram_loss
from parallel.formulas import all_reduce_bytes, data_parallel_memory, gpt_parameters
from parallel.progress import start
from parallel.report import (
    ReportError,
    Traffic,
    check_plotting,
    check_writable,
    plot,
    traffic_table,
    write_json,
)
from parallel.train import (
    ConfigurationError,
    DivergenceError,
    Step,
    Trainer,
    TrainingConfiguration,
    blas_threads,
)

USAGE_ERROR = 2
# How far the losses of several ranks may lie from those of one: absolute in float32, relative in float64.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


@dataclass(frozen=True)
class Options:
    """What the command line asks for: the training, its data, and what to leave behind."""

    ranks: int
    data: str
    training: TrainingConfiguration
    threads: int | None = None
    report: str | None = None
    plot: str | None = None
    generate: int = 0
    compare_steps: int = 0


def complain(text: str) -> None:
    """Write an error of one line to stderr, in one piece: the lines of several ranks would mix otherwise."""
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()


def prepare(options: Options, *, writes: bool = True) -> Corpus:
    """Return the corpus if nothing stands in the way of training; raises one of USAGE_ERRORS otherwise.

    `writes`: whether this process will write the files that are asked for, as rank 0 does.
    """
    options.training.check(options.ranks)
    for name in ("generate", "compare_steps"):
        if getattr(options, name) < 0:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(options, name)}")
    if options.threads is not None and options.threads < 1:
        raise ConfigurationError(f"--threads must be at least 1, got {options.threads}")
    if options.report is not None and writes:
        check_writable(options.report, "--report")
    if options.plot is not None and writes:
        check_plotting(options.plot)
    _check_memory(options)
    corpus = load(options.data)
    corpus.check(options.training.seq)
    return corpus


def _check_memory(options: Options) -> None:
    """Raise ConfigurationError if what a rank holds in any case is more than this machine has in all."""
    c = options.training
    itemsize = np.dtype(c.dtype).itemsize
    parameters = gpt_parameters(c.layers, c.hidden, c.seq)
    logits = c.batch // options.ranks // c.micro_batches * c.seq * 256 * itemsize
    windows = max(1, c.validation_batches) * c.batch // options.ranks * (c.seq + 1) * 8
    needed = sum(astuple(data_parallel_memory(parameters, itemsize))) + logits + windows
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
    if needed > installed:
        raise ConfigurationError(
            f"{parameters:,} parameters and {c.batch // options.ranks:,} sequences a rank take at least "
            f"{needed / 2**30:,.0f} GiB, and this machine has {installed / 2**30:,.0f} GiB; "
            "give a smaller --hidden, --layers, --seq, --batch or --validation-batches"
        )


USAGE_ERRORS = (ConfigurationError, DataError, ReportError)


def run(options: Options, communicator: Communicator) -> int:
    """Train as a rank of `communicator`; returns this rank's exit status. Rank 0 prints and writes files."""
    if communicator.size != options.ranks:
        if communicator.rank == 0:
            complain(
                f"--layout dp{options.ranks} wants {options.ranks} ranks, but the launcher started "
                f"{communicator.size}; make the two numbers equal"
            )
        return USAGE_ERROR
    corpus = _prepare_together(options, communicator)
    if corpus is None:
        return USAGE_ERROR
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = options.threads or max(1, cores // _local_ranks(communicator))
    options = replace(options, threads=threads)
    # An overflow shows in the loss, which is checked; numpy would warn of it on every rank.
    with blas_threads(threads), np.errstate(all="ignore"):
        try:
            result = _train(options, corpus, communicator)
            if communicator.rank:
                return 0 if result.traffic["dp"].exact else 1
            return _conclude(options, corpus, result)
        except DivergenceError as error:  # on every rank alike, so that one message says it all
            if communicator.rank == 0:
                complain(str(error))
            return 1


def _prepare_together(options: Options, communicator: Communicator) -> Corpus | None:
    """Return the corpus if every rank can train, on the same data and as configured alike; else None.

    A file may be missing, or another version of it lie, on one host only. One rank prints what is wrong.
    """
    corpus, problem, digest = None, None, hashlib.sha256(repr(options.training).encode())
    try:
        corpus = prepare(options, writes=communicator.rank == 0)
        digest.update(corpus.training.data)
        digest.update(corpus.validation.data)
    except USAGE_ERRORS as error:
        problem = error
    mine = np.frombuffer(bytes([corpus is not None]) + digest.digest(), np.uint8)
    everyone = communicator.all_gather(mine)
    unable = np.flatnonzero(everyone[:, 0] == 0)
    differing = np.flatnonzero((everyone != everyone[0]).any(axis=1))
    if unable.size:
        if communicator.rank == unable[0]:
            complain(f"rank {communicator.rank}: {problem}")
        return None
    if differing.size:
        if communicator.rank == 0:
            listed = ", ".join(map(str, differing))
            complain(f"rank {listed}: other data or flags than those of rank 0; give all ranks the same")
        return None
    return corpus


@dataclass(frozen=True)
class _Result:
    """What the ranks found together, with the trainer and a communicator of this rank alone to go on with."""

    trainer: Trainer
    alone: Communicator
    steps: list[Step]
    validation: tuple[float, float]
    weights_sha256: str
    traffic: dict[str, Traffic]
    peak_resident: list[int]


def _train(options: Options, corpus: Corpus, communicator: Communicator) -> _Result:
    c, ranks = options.training, options.ranks
    axes = {"dp": communicator.dup(), "metrics": communicator.dup()}
    alone = cast("Communicator", communicator.split(communicator.rank))
    trainer = Trainer(c, corpus, axes["dp"], axes["metrics"])
    talks = communicator.rank == 0
    if talks:
        print(
            f"{trainer.parameters.size:,} parameters on {ranks} ranks, {c.dtype}; "
            f"{len(corpus.training):,} bytes to train on, {len(corpus.validation):,} to validate, "
            f"from {corpus.files:,} files ({options.data})",
            flush=True,
        )
    before = trainer.validate()
    steps = []
    if talks:
        with start(c.steps, c.batch * c.seq) as progress:
            for _ in range(c.steps):
                steps.append(trainer.step())
                progress.update(steps[-1])
    else:
        steps = [trainer.step() for _ in range(c.steps)]
    after = trainer.validate()
    sent = {name: axis.stats.bytes_sent for name, axis in axes.items()}
    gradients = trainer.parameters.gradients
    mine = np.array([sent["dp"], sent["metrics"], _peak_resident()], np.int64)
    everyone = communicator.all_gather(mine)
    formula = {
        "dp": [c.steps * n for n in axes["dp"].explain("all_reduce", gradients.nbytes, dtype=c.dtype).bytes_sent],
        # One float64 a step, and one a validation.
        "metrics": [(c.steps + 2) * n for n in axes["metrics"].explain("all_reduce", 8, dtype="float64").bytes_sent],
    }
    traffic = {
        name: Traffic(tuple(int(n) for n in everyone[:, column]), tuple(formula[name]))
        for column, name in enumerate(axes)
    }
    digest = trainer.weights_sha256()
    return _Result(trainer, alone, steps, (before, after), digest, traffic, [int(n) for n in everyone[:, 2]])


def _conclude(options: Options, corpus: Corpus, result: _Result) -> int:
    c, losses, failures = options.training, [step.loss for step in result.steps], []
    unigram = unigram_loss(corpus)
    before, after = result.validation
    seconds = sum(step.seconds for step in result.steps)
    communication = sum(step.communication_seconds for step in result.steps)
    print(f"\n{c.steps} steps in {seconds:.1f} s, {communication / seconds:.0%} of it in communication")
    print(
        f"validation loss {before:.4f} before, {after:.4f} after (nats a byte); "
        f"byte frequencies alone give {unigram:.4f}"
    )
    print(f"weights sha256 {result.weights_sha256}{', the same on all ranks' if options.ranks > 1 else ''}")
    print(f"\nBytes sent, {c.steps} steps:\n{traffic_table(result.traffic)}", flush=True)
    dp = result.traffic["dp"]
    for rank, (measured, formula) in enumerate(zip(dp.measured, dp.formula, strict=True)):
        if measured != formula:
            failures.append(f"rank {rank} sent {measured:,} bytes on axis dp, but the formula says {formula:,}")
    gradients = result.trainer.parameters.gradients
    expected = c.steps * all_reduce_bytes(gradients.size, gradients.itemsize, options.ranks)
    if gradients.nbytes >= LARGE_MESSAGE and sum(dp.measured) != expected:
        failures.append(
            f"all ranks sent {sum(dp.measured):,} bytes on axis dp, but 2·(p − 1)·gradients is {expected:,}"
        )
    comparison = None
    if options.compare_steps:
        count = min(options.compare_steps, c.steps)
        alone = Trainer(c, corpus, result.alone, result.alone)
        comparison = Comparison.of(losses[:count], [alone.step().loss for _ in range(count)], c.dtype)
        print(f"\n{comparison}", flush=True)
        if not comparison.equal:
            failures.append(str(comparison))
    if options.generate:
        began = time.perf_counter()
        passage = result.trainer.generate(options.generate).decode("utf-8", "replace")
        printable = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in passage)
        print(
            f"\n{options.generate} generated bytes ({time.perf_counter() - began:.1f} s):\n{printable}\n",
            flush=True,
        )
    if options.plot:
        single = comparison.losses if comparison else []
        plot(options.plot, losses, options.ranks, single, result.validation, unigram)
        print(f"wrote {options.plot}")
    if options.report:
        write_json(options.report, _document(options, corpus, result, comparison, unigram))
        print(f"wrote {options.report}")
    sys.stdout.flush()
    for failure in failures:
        complain(failure)
    return 1 if failures else 0


@dataclass(frozen=True)
class Comparison:
    """The losses of the same training on one rank, and how far those of several ranks lie from them."""

    losses: list[float]
    largest_difference: float
    limit: float
    relative: bool

    @classmethod
    def of(cls, several: list[float], one: list[float], dtype: str) -> Comparison:
        """Compare losses step by step, absolutely in float32 and relative to the loss in float64."""
        relative = dtype == "float64"
        differences = [abs(a - b) / (abs(b) if relative else 1.0) for a, b in zip(several, one, strict=True)]
        return cls(one, float(np.max(differences)), TOLERANCE[dtype], relative)

    @property
    def equal(self) -> bool:
        """Whether the difference is within the limit."""
        return self.largest_difference <= self.limit

    def __str__(self) -> str:
        kind = "relative difference" if self.relative else "difference"
        return (
            f"largest {kind} in loss to one rank over {len(self.losses)} steps: "
            f"{self.largest_difference:.3g} (at most {self.limit:g})"
        )


def _document(
    options: Options, corpus: Corpus, result: _Result, comparison: Comparison | None, unigram: float
) -> dict[str, object]:
    parameters = result.trainer.parameters
    return {
        "configuration": {
            "layout": f"dp{options.ranks}",
            "ranks": options.ranks,
            "data": options.data,
            "threads": options.threads,
            **asdict(options.training),
        },
        "data": {
            "files": corpus.files,
            "training_bytes": len(corpus.training),
            "validation_bytes": len(corpus.validation),
        },
        "parameters": parameters.size,
        "losses": [step.loss for step in result.steps],
        "validation_loss_before": result.validation[0],
        "validation_loss": result.validation[1],
        "unigram_loss": unigram,
        "weights_sha256": result.weights_sha256,
        "bytes": {axis: traffic.document() for axis, traffic in result.traffic.items()},
        "memory": {
            "measured": asdict(result.trainer.memory()),
            "formula": asdict(data_parallel_memory(parameters.size, parameters.values.itemsize)),
            "peak_resident": result.peak_resident,
        },
        "step_seconds": [step.seconds for step in result.steps],
        "communication_seconds": sum(step.communication_seconds for step in result.steps),
        "comparison": asdict(comparison) if comparison else None,
    }


def _local_ranks(communicator: Communicator) -> int:
    """How many ranks run on this host."""
    mine = np.frombuffer(hashlib.sha256(platform.node().encode()).digest(), np.uint8)
    return int((communicator.all_gather(mine) == mine).all(axis=1).sum())


def _peak_resident() -> int:
    """Bytes of memory that this process has held at most."""
    try:
        # On Linux getrusage also counts what the process that started this one held.
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        found = None
    if found is None:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return int(found[1]) * 1024
