"""The training job: what all ranks do from the first check to the last line of output."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import resource
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from collectives import Communicator
from parallel import accounting, bubble
from parallel.autograd import Array
from parallel.checkpoint import CheckpointError, Saver
from parallel.configuration import ConfigurationError, TrainingConfiguration
from parallel.data import Corpus, unigram_loss
from parallel.formulas import Memory
from parallel.progress import start
from parallel.report import Traffic, memory_table, plot, traffic_table, write_json
from parallel.request import USAGE_ERROR, Options, complain, prepare_together
from parallel.schedules import Action, drawing
from parallel.stages import compare_stages
from parallel.timeline import Event, Timeline, chrome_trace, draw, gather, last_steps
from parallel.train import DivergenceError, Step, Trainer, blas_threads, generate, to_host

_COST_STEPS = 5
# How far the losses of several ranks may lie from those of one: relative in float64, else absolute. Gradients of 16 bits are
# rounded on every rank before they are added up.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 3e-2, "float16": 1e-2}


def run(options: Options, communicator: Communicator) -> int:
    """Train as a rank of `communicator`; returns this rank's exit status. Rank 0 prints and writes files."""
    if communicator.size != options.ranks:
        if communicator.rank == 0:
            complain(
                f"--layout {options.training.layout(options.ranks)} wants {options.ranks} ranks, but the launcher started "
                f"{communicator.size}; make the two numbers equal"
            )
        return USAGE_ERROR
    corpus = prepare_together(options, communicator)
    if corpus is None:
        return USAGE_ERROR
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = options.threads or (1 if options.training.exact else max(1, cores // _local_ranks(communicator)))
    options = replace(options, threads=threads)
    # An overflow shows in the loss, which is checked; numpy would warn of it on every rank.
    with blas_threads(threads), np.errstate(all="ignore"):
        try:
            if options.stages:
                found = compare_stages(options.training, corpus, communicator)
                if communicator.rank == 0:
                    print(found)
                return 0
            result = _train(options, corpus, communicator)
            if communicator.rank:
                return 0 if all(traffic.exact for traffic in result.traffic.values()) else 1
            return _conclude(options, corpus, result)
        # On every rank alike, so that one message says it all.
        except (DivergenceError, CheckpointError, ConfigurationError) as error:
            if communicator.rank == 0:
                complain(str(error))
            return 1


@dataclass(frozen=True)
class _Result:
    """What the ranks found together, with the trainer and a communicator of this rank alone to go on with."""

    trainer: Trainer
    alone: Communicator
    steps: list[Step]
    first: int
    validation: tuple[float, float]
    weights_sha256: str
    traffic: dict[str, Traffic]
    inexact_seconds: list[float]
    memory: list[tuple[Memory, Memory]]
    peak_resident: list[int]
    weights: dict[str, Array]
    events: list[list[Event]]
    conduct: list[bubble.Conduct]
    actions: list[list[tuple[Action, float, float]]]


def _train(options: Options, corpus: Corpus, communicator: Communicator) -> _Result:
    c, ranks = options.training, options.ranks
    alone = cast("Communicator", communicator.split(communicator.rank))
    timeline = Timeline()
    trainer = Trainer(c, corpus, communicator, timeline if options.trace else None)
    if options.resume:
        differing = trainer.restore(options.resume)
    talks = communicator.rank == 0
    if talks:
        print(
            f"{trainer.parameter_count:,} parameters on {_plural(ranks, 'rank')}, {_described(c, ranks)}, {c.dtype}; "
            f"{len(corpus.training):,} bytes to train on, {len(corpus.validation):,} to validate, "
            f"from {corpus.files:,} files ({options.data})",
            flush=True,
        )
        if c.tp * c.pp * c.cp > 1:
            print(trainer.mesh.describe(), flush=True)
        if options.resume:
            print(f"continuing after step {trainer.steps} of {options.resume}", flush=True)
            if differing:
                print(f"other settings than the checkpoint's: {', '.join(differing)}", flush=True)
    before = trainer.validate()
    first, steps = trainer.steps, []
    with ExitStack() as stack:
        progress = stack.enter_context(start(c.steps, c.batch * c.seq, first)) if talks else None
        saver = stack.enter_context(Saver(options.save, trainer.files, keep=options.keep)) if options.save else None
        while trainer.steps < c.steps:
            steps.append(trainer.step())
            if progress is not None:
                progress.update(steps[-1])
            if saver is not None and (trainer.steps % options.save_every == 0 or trainer.steps == c.steps):
                saver.start(trainer.pieces(), trainer.metadata(), trainer.steps)
            elif saver is not None:
                saver.poll()  # which commits what has been written
    after = trainer.validate()
    sent, expected = accounting.traffic(trainer), accounting.expected_traffic(trainer, 2)
    memory, predicted = accounting.memory(trainer), accounting.expected_memory(trainer)
    mine = [*sent.values(), *(expected[name] for name in sent)]
    mine += [*astuple(memory), *astuple(predicted), _peak_resident()]
    everyone = communicator.all_gather(np.array(mine, np.int64))
    count = len(sent)
    traffic = {
        name: Traffic(tuple(int(n) for n in everyone[:, i]), tuple(int(n) for n in everyone[:, count + i]))
        for i, name in enumerate(sent)
        if everyone[:, i].any() or everyone[:, count + i].any() or name == "reduce"
    }
    conduct = bubble.conduct(trainer) if c.pp > 1 else []
    actions = bubble.last_actions(trainer) if options.timeline else []
    without = []
    if c.exact and (other := c.inexact(ranks)) is not None:
        inexact = Trainer(other, corpus, communicator)
        without = [inexact.step().seconds for _ in range(min(_COST_STEPS, len(steps)))]
        inexact.replica.settle()
    weights = {name: to_host(data).copy() for name, data in trainer.parameters()} if options.generate else {}
    events = gather(timeline, communicator) if options.trace else []
    return _Result(
        trainer, alone, steps, first, (before, after), trainer.weights_sha256(), traffic,
        without, [_memory(row[2 * count : -1]) for row in everyone.tolist()], [int(n) for n in everyone[:, -1]], weights, events,
        conduct, actions,
    )  # fmt: skip


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _described(c: TrainingConfiguration, ranks: int) -> str:
    """The layout, and how it is run."""
    words = [c.layout(ranks)]
    if c.pp > 1:
        words.append(f"{c.schedule} of {_plural(c.passes(c.dp(ranks)), 'micro-batch').replace('hs', 'hes')}")
    if c.sequence_parallel:
        words.append("sequence parallel")
    return ", ".join([*words, f"ZeRO stage {c.zero}", *(["exact"] if c.exact else [])])


def _memory(numbers: list[int]) -> tuple[Memory, Memory]:
    """What a rank found and what it expected, as they travelled."""
    half = len(numbers) // 2
    return Memory(*numbers[:half]), Memory(*numbers[half:])


def _conclude(options: Options, corpus: Corpus, result: _Result) -> int:
    c, losses = options.training, [step.loss for step in result.steps]
    unigram = unigram_loss(corpus)
    before, after = result.validation
    seconds = sum(step.seconds for step in result.steps)
    communication = sum(step.communication_seconds for step in result.steps)
    print(f"\n{len(losses)} steps in {seconds:.1f} s, {communication / seconds:.0%} of it in communication")
    if result.inexact_seconds:
        cost = statistics.median(step.seconds for step in result.steps) / statistics.median(result.inexact_seconds)
        print(
            f"exact sums make a step {cost:.2f} times as long (median of {len(result.inexact_seconds)} steps without)"
        )
    print(
        f"validation loss {before:.4f} before, {after:.4f} after (nats a byte); "
        f"byte frequencies alone give {unigram:.4f}"
    )
    print(f"weights sha256 {result.weights_sha256}{', the same on all ranks' if options.ranks > 1 else ''}")
    print(f"\nBytes sent, {len(losses)} steps:\n{traffic_table(result.traffic)}", flush=True)
    memory, predicted = result.memory[0]
    print(f"\nMemory of rank 0:\n{memory_table(memory, predicted, result.peak_resident[0])}", flush=True)
    if result.conduct:
        print(f"\nPipelines ({c.schedule}; idle as a share of the whole time):\n{bubble.conduct_table(result.conduct)}")
    failures = [*_differences(result), *bubble.differences(result.conduct)]
    comparison = None
    if options.compare_steps:
        count = min(options.compare_steps, len(losses))
        alone = Trainer(c.alone(), corpus, result.alone)
        for _ in range(result.first):
            alone.step()
        comparison = Comparison.of(losses[:count], [alone.step().loss for _ in range(count)], c.dtype, c.exact)
        print(f"\n{comparison}", flush=True)
        if not comparison.equal:
            failures.append(str(comparison))
    if options.generate:
        began = time.perf_counter()
        passage = generate(result.weights, c, options.generate).decode("utf-8", "replace")
        printable = "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in passage)
        print(
            f"\n{options.generate} generated bytes ({time.perf_counter() - began:.1f} s):\n{printable}\n",
            flush=True,
        )
    if options.plot:
        single = comparison.losses if comparison else []
        plot(options.plot, losses, options.ranks, single, result.validation, unigram, result.first)
        print(f"wrote {options.plot}")
    if options.trace:
        write_json(options.trace, chrome_trace(result.events))
        print(f"wrote {options.trace}")
        if options.trace_plot:
            draw(options.trace_plot, last_steps(result.events, 2), f"Two steps, {_described(c, options.ranks)}")
            print(f"wrote {options.trace_plot}")
    if options.timeline:
        drawing.draw(options.timeline, result.trainer.pipeline.schedule, result.actions)
        print(f"wrote {options.timeline}")
    if options.report:
        write_json(options.report, _document(options, corpus, result, comparison, unigram))
        print(f"wrote {options.report}")
    sys.stdout.flush()
    for failure in failures:
        complain(failure)
    return 1 if failures else 0


def _differences(result: _Result) -> list[str]:
    """What was measured and is not what the formulas say, in words."""
    failures = []
    for axis, traffic in result.traffic.items():
        for rank, (measured, formula) in enumerate(zip(traffic.measured, traffic.formula, strict=True)):
            if measured != formula:
                failures.append(f"rank {rank} sent {measured:,} bytes on axis {axis}, but the formula says {formula:,}")
    for rank, (memory, predicted) in enumerate(result.memory):
        for kind, expected in asdict(predicted).items():
            found = getattr(memory, kind)
            if expected != found:
                failures.append(f"rank {rank} holds {found:,} bytes of {kind}, but the formula says {expected:,}")
    return failures


@dataclass(frozen=True)
class Comparison:
    """The losses of the same training on one rank, and how far those of several ranks lie from them."""

    losses: list[float]
    largest_difference: float
    limit: float
    relative: bool

    @classmethod
    def of(cls, several: list[float], one: list[float], dtype: str, exact: bool = False) -> Comparison:
        """Compare losses step by step, relative to the loss in float64 and absolutely else; `exact`: every bit."""
        relative = dtype == "float64"
        differences = [abs(a - b) / (abs(b) if relative else 1.0) for a, b in zip(several, one, strict=True)]
        return cls(one, float(np.max(differences)), 0.0 if exact else TOLERANCE[dtype], relative)

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
    memory, predicted = result.memory[0]
    return {
        "configuration": {
            "layout": options.training.layout(options.ranks),
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
        "parameters": result.trainer.parameter_count,
        "parameters_padded": sum(unit.layout.padded for unit in result.trainer.replica.units),
        "first_step": result.first,
        "losses": [step.loss for step in result.steps],
        "validation_loss_before": result.validation[0],
        "validation_loss": result.validation[1],
        "unigram_loss": unigram,
        "weights_sha256": result.weights_sha256,
        "bytes": {axis: traffic.document() for axis, traffic in result.traffic.items()},
        "memory": {
            "measured": asdict(memory),
            "formula": asdict(predicted),
            "peak_resident": result.peak_resident,
        },
        "pipeline": [asdict(row) for row in result.conduct],
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
