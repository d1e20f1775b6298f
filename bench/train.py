"""`python -m bench train`: a whole training, beside PyTorch's on the CPU over Gloo, taking turns."""

from __future__ import annotations

import argparse
import os
import tempfile
from itertools import product
from pathlib import Path

import collectives as cc
from bench.harness.jobs import Program, absent, listen, running
from bench.harness.record import Notes, write
from bench.training.contestants import ALONE, LAYOUTS, TORCH, groups, names
from bench.training.driver import measure
from bench.training.table import HEADER, TITLE, line, rows, summary
from bench.training.worker import Specification
from parallel.configuration import ConfigurationError, TrainingConfiguration

_STEPS = 1000
"""The learning rate is planned for so many, of which only the first are taken."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench train", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks")
    parser.add_argument("--layouts", default="", help=f"what is compared: {', '.join(LAYOUTS)}, or all; by default dp")
    parser.add_argument(
        "--with", dest="contestants", default="", help=f"only these take part; there are {', '.join(names())}"
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences of one rank")
    parser.add_argument("--data", default="stdlib", help="as of python -m parallel train")
    parser.add_argument("--learn", type=int, default=20, help="first steps, whose losses are compared")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn, and as many without communication")
    parser.add_argument("--json", metavar="FILE", help="write everything there as well")
    return parser


def main(arguments: list[str]) -> int:
    """Run the comparison that the command line asks for; returns 1 if nothing was measured."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        ranks = [int(number) for number in asked.ranks.split(",")]
        wanted = [name for name in asked.contestants.split(",") if name]
        layouts = [name for name in asked.layouts.split(",") if name]
        _training(asked, 1)
    except (ValueError, ConfigurationError) as error:
        parser.error(str(error))
    if min(ranks) < 2:
        parser.error(f"--ranks is {asked.ranks}; expected numbers from 2")
    if min(asked.learn, asked.rounds, asked.steps) < 1:
        parser.error("--learn, --rounds and --steps must be at least 1")
    for name in wanted:
        if name not in names():
            parser.error(f"there is no contestant {name}; there are: {', '.join(names())}")
    if layouts == ["all"]:
        layouts = list(LAYOUTS)
    for name in layouts:
        if name not in LAYOUTS:
            parser.error(f"there is no layout {name}; there are: {', '.join(LAYOUTS)}, all")
    if cc.under_launcher():
        parser.error("it starts its ranks itself: run it without a launcher")
    return _compare(asked, ranks, groups(layouts, wanted))


def _training(asked: argparse.Namespace, ranks: int) -> TrainingConfiguration:
    """What `ranks` ranks train; raises ConfigurationError where they cannot."""
    training = TrainingConfiguration(
        layers=asked.layers, hidden=asked.hidden, heads=asked.heads, seq=asked.seq, batch=asked.batch * ranks, steps=_STEPS,
        warmup=10, lr=1e-3,
    )  # fmt: skip
    training.check(ranks)
    return training


def _compare(asked: argparse.Namespace, numbers: list[int], layouts: dict[str, list[str]]) -> int:
    """On each number of ranks and for each layout, start a job for every contestant, and lead them."""
    say, table, cores = Notes(), [], sorted(os.sched_getaffinity(0))
    say.machine()
    if any(name in TORCH for wanted in layouts.values() for name in wanted) and (reason := absent("gloo")):
        say(f"PyTorch is left out: {reason}")
        layouts = {layout: [name for name in wanted if name not in TORCH] for layout, wanted in layouts.items()}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        listener, address = listen(Path(name))
        for ranks, layout in product(numbers, layouts):
            folder = Path(name) / f"{layout}-{ranks}"
            folder.mkdir()
            programs = {}
            for contestant in layouts[layout]:
                own = 1 if contestant in ALONE else ranks
                specification = Specification(
                    address, contestant, cores, str(folder / f"store-{contestant}"), asked.data, _training(asked, own)
                )
                library = "gloo" if contestant in TORCH else "ours"
                programs[contestant] = Program(library, ["bench.training.worker", specification.encode()], own)
            with running(programs, listener, folder) as (jobs, lost):
                for job in jobs:
                    for contestant, description in job.joined.items():
                        say(f"{contestant}: {description}")
                    lost |= job.missing
                for contestant, reason in lost.items():
                    say(f"{contestant} is left out on {ranks} ranks: {reason}")
                measured = measure(jobs, asked.learn, asked.rounds, asked.steps, say)
            found = rows(measured, asked.batch * asked.seq, len(cores), layout)
            print(
                f"\n# {layout or 'together'}: {asked.learn} steps learnt, then timed, {ranks} ranks; {TITLE}\n{HEADER}"
            )
            for row in found:
                print(line(row), flush=True)
            table += found
    if table:
        print(f"\n{summary(table)}")
    write(asked, say, table)
    return 0 if table else 1
