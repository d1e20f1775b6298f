"""`python -m bench`: this library beside its peers, each in processes of its own launcher, taking turns.

Started under a launcher, as in `mpirun -n 2 python -m bench`, it measures in that job alone, against the MPI of that job.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

import collectives as cc
from bench import train
from bench.harness import sizes
from bench.harness.case import cases
from bench.harness.contestants import Unavailable, mpi
from bench.harness.driver import Driver
from bench.harness.jobs import Job, Program, assemble, listen, running, wanted
from bench.harness.record import Notes, write
from bench.harness.table import HEADER, PEERS, Row, line, summary
from bench.harness.worker import Specification, serve

_TITLE = "ratio = best peer's time ÷ ours; floor = time of the copies that cannot be avoided ÷ ours"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__.partition("\n")[0] if __doc__ else None,
        epilog="`python -m bench train` compares whole trainings; it has a --help of its own",
    )
    parser.add_argument("collectives", nargs="*", metavar="collective", help=f"by default all: {', '.join(cases())}")
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks (default: 2,4)")
    parser.add_argument("--sizes", default=sizes.DEFAULT, help=f"in bytes (default: {sizes.DEFAULT})")
    parser.add_argument("--odd", action="store_true", help="also sizes that are neither powers of two nor whole pages")
    parser.add_argument("--first-touch", action="store_true", help="allocate the buffers anew for every run")
    parser.add_argument("--iterations", type=int, help="for every size (default: from 15 down to 3 for the largest)")
    parser.add_argument("--transports", default="shm,tcp,mpi", help="ours (default: shm,tcp,mpi)")
    parser.add_argument(
        "--peers", default=",".join(PEERS), help=f"those that are installed (default: {','.join(PEERS)})"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there as well")
    return parser


class Benchmark:
    """What the command line asks for, and the rows so far."""

    def __init__(self, arguments: list[str]) -> None:
        parser = _parser()
        self.arguments = parser.parse_args(arguments)
        self.names = self.arguments.collectives or list(cases())
        try:
            self.sizes = sizes.parse(self.arguments.sizes)
            self.ranks = [int(number) for number in self.arguments.ranks.split(",")]
        except ValueError as error:
            parser.error(str(error))
        if self.arguments.odd:
            self.sizes = sorted({*self.sizes, *sizes.ODD})
        self.transports = [name for name in self.arguments.transports.split(",") if name]
        self.peers = [name for name in self.arguments.peers.split(",") if name]
        for name, known in ((n, cases()) for n in self.names):
            if name not in known:
                parser.error(f"there is no benchmark {name}; there are: {', '.join(known)}")
        for name in self.peers:
            if name not in PEERS:
                parser.error(f"there is no peer {name}; there are: {', '.join(PEERS)}")
        if min(self.ranks) < 2:
            parser.error(f"--ranks is {self.arguments.ranks}; expected numbers from 2")
        self.say = Notes()
        self.rows: list[Row] = []

    def measure(self, jobs: list[Job], ranks: int) -> None:
        """Everything on these jobs."""
        for job in jobs:
            for name, description in job.joined.items():
                self.say(f"{name}: {description}")
            for name, reason in job.missing.items():
                self.say(f"{name} is left out: {reason}")
        driver = Driver(jobs, ranks, self.say, fresh=self.arguments.first_touch, iterations=self.arguments.iterations)
        for name in self.names:
            case = cases()[name]
            print(f"\n# {name}, {ranks} ranks; {_TITLE}\n{HEADER}", flush=True)
            for size in self.sizes if name != "barrier" else self.sizes[:1]:
                for row in driver.cell(case, size):
                    self.rows.append(row)
                    print(line(row), flush=True)

    def finish(self) -> int:
        """The summary, and the exit code: 1 if anything was wrong, or nothing was measured."""
        if table := summary(self.rows):
            print(f"\n# the best peer's time ÷ ours; above 1 this library is faster\n\n{table}")
        wrong = sum(row.wrong for row in self.rows)
        if wrong:
            print(f"# {wrong} elements were wrong", flush=True)
        write(self.arguments, self.say, self.rows)
        return 1 if wrong or not self.rows else 0


def drive(benchmark: Benchmark) -> int:
    """Alone: start a job for every contestant library and number of ranks, and lead them."""
    benchmark.say.machine()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        listener, address = listen(folder)
        cores = sorted(os.sched_getaffinity(0))
        for ranks in benchmark.ranks:
            plan = wanted(benchmark.transports, benchmark.peers, benchmark.say)
            programs = {}
            for job, contestants in plan.items():
                specification = Specification(address, job, contestants, cores, str(folder / f"store-{ranks}"))
                programs[job] = Program(job, ["bench.harness.worker", specification.encode()], ranks)
            with running(programs, listener, folder) as (jobs, lost):
                for job, reason in lost.items():
                    benchmark.say(f"{', '.join(plan[job])} left out on {ranks} ranks: {reason}")
                benchmark.measure(jobs, ranks)
    return benchmark.finish()


def join(benchmark: Benchmark) -> int:
    """Under a launcher: this process is a rank; rank 0 leads all of them, itself included, from a thread that sleeps meanwhile."""
    comm = cc.init()
    cores = sorted(os.sched_getaffinity(0))
    try:
        peers = [mpi(comm.size > (os.cpu_count() or 1))[1]]
    except Unavailable:
        peers = []
    transports = wanted(benchmark.transports, (), lambda _: None).get("ours", [])
    names = [*transports, *(name for name in benchmark.transports if name == "mpi"), *peers]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        text = np.zeros(256, np.uint8)
        code = 0
        leader = None
        if comm.rank == 0:
            listener, address = listen(Path(name))
            text[: len(address)] = np.frombuffer(address.encode(), np.uint8)

            def lead() -> None:
                nonlocal code
                job = Job("this job", ranks=comm.size)
                try:
                    assemble(listener, {job.name: job})
                    benchmark.measure([job], comm.size)
                    code = benchmark.finish()
                finally:
                    job.leave()

            leader = threading.Thread(target=lead)
            leader.start()
        comm.broadcast(text)
        address = bytes(text).rstrip(b"\0").decode()
        serve(Specification(address, "this job", names, cores))
        if leader is not None:
            leader.join()
    return code


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that the command line asks for; returns 1 if any result was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["train"]:
        return train.main(arguments[1:])
    benchmark = Benchmark(arguments)
    mode: Callable[[Benchmark], int] = join if cc.under_launcher() else drive
    return mode(benchmark)


if __name__ == "__main__":
    sys.exit(main())
