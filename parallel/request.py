"""What is asked of a training job, and whether it can be: every check that needs no other rank."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallel.configuration import ConfigurationError, TrainingConfiguration
from parallel.data import Corpus, DataError, load
from parallel.formulas import gpt_parameters, model_state
from parallel.report import ReportError, check_plotting, check_writable

if TYPE_CHECKING:
    from collectives import Communicator


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
    save: str | None = None
    save_every: int = 100
    keep: int | None = None
    resume: str | None = None
    trace: str | None = None
    trace_plot: str | None = None
    timeline: str | None = None
    stages: bool = False


def complain(text: str) -> None:
    """Write an error of one line to stderr, in one piece: the lines of several ranks would mix otherwise."""
    sys.stderr.write(f"error: {text}\n")
    sys.stderr.flush()


USAGE_ERROR = 2
"""The exit status of a request that cannot be."""


def prepare(options: Options, *, writes: bool = True) -> Corpus:
    """Return the corpus if nothing stands in the way of training; raises one of USAGE_ERRORS otherwise.

    `writes`: whether this process will write the files that are asked for, as rank 0 does.
    """
    options.training.check(options.ranks)
    for name in ("generate", "compare_steps"):
        if getattr(options, name) < 0:
            raise ConfigurationError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(options, name)}")
    if options.save_every < 1:
        raise ConfigurationError(f"--save-every must be at least 1, got {options.save_every}")
    if options.keep is not None and options.keep < 1:
        raise ConfigurationError(f"--keep must be at least 1, got {options.keep}")
    if options.trace_plot is not None and options.trace is None:
        raise ConfigurationError("--trace-plot draws what --trace has recorded: give --trace FILE as well")
    if options.threads is not None and options.threads < 1:
        raise ConfigurationError(f"--threads must be at least 1, got {options.threads}")
    if options.training.exact:
        _check_one_thread(options.threads)
    if options.report is not None and writes:
        check_writable(options.report, "--report")
    if options.trace is not None and writes:
        check_writable(options.trace, "--trace")
    if options.save is not None and writes and Path(options.save).exists() and not Path(options.save).is_dir():
        raise ConfigurationError(f"--save {options.save}: it is a file; name a folder")
    if options.timeline is not None and options.training.pp == 1:
        raise ConfigurationError("--timeline draws a pipeline: give a layout with pp2 or more as well")
    pictures = (options.plot, "--plot"), (options.trace_plot, "--trace-plot"), (options.timeline, "--timeline")
    for path, flag in pictures:
        if path is not None and writes:
            check_plotting(path, flag)
    _check_memory(options)
    corpus = load(options.data)
    corpus.check(options.training.seq)
    return corpus


def _check_one_thread(threads: int | None) -> None:
    """Raise ConfigurationError unless matrix products can be held to one thread: how they are cut decides their bits."""
    if threads not in (None, 1):
        raise ConfigurationError(
            f"--threads is {threads}, but how a matrix product is cut among threads decides its bits: "
            "leave --threads or --exact out"
        )
    if find_spec("threadpoolctl") is None:
        raise ConfigurationError(
            "--exact: threadpoolctl is missing, which holds matrix products to one thread; install the extra 'train'"
        )


def _check_memory(options: Options) -> None:
    """Raise ConfigurationError if what a rank holds in any case is more than this machine has in all."""
    c = options.training
    dp, storage, itemsize = c.dp(options.ranks), c.sharding.storage.itemsize, c.sharding.compute.itemsize
    parameters = gpt_parameters(c.layers, c.hidden, c.seq, key_width=c.key_width)
    held = parameters // (c.tp * c.pp)
    state = model_state(c.zero, dp * c.cp // c.replicas, held, storage, itemsize)
    logits = c.batch // dp // c.micro_batches * c.seq * 256 * itemsize // (c.tp * c.cp)
    windows = max(1, c.validation_batches) * c.batch // dp * (c.seq + 1) * 8
    needed = sum(astuple(state)) + logits + windows
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
    if needed > installed:
        raise ConfigurationError(
            f"{parameters:,} parameters and {c.batch // dp:,} sequences a rank take at least "
            f"{needed / 2**30:,.0f} GiB, and this machine has {installed / 2**30:,.0f} GiB; "
            "give a smaller --hidden, --layers, --seq, --batch or --validation-batches"
        )


USAGE_ERRORS = (ConfigurationError, DataError, ReportError)


def prepare_together(options: Options, communicator: Communicator) -> Corpus | None:
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
