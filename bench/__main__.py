"""`mpirun -n 2 python -m bench`: this library beside its peers, in the same processes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from dataclasses import asdict
from pathlib import Path

import bench
from bench.harness import HEADER, Case, contestants, line, measure


def _cases() -> dict[str, Case]:
    modules = (
        importlib.import_module(f"bench.{module.name}")
        for module in pkgutil.iter_modules(bench.__path__)
        if module.name != "__main__"
    )
    return {module.CASE.name: module.CASE for module in modules if hasattr(module, "CASE")}


def _bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1].upper()] if text[-1].upper() in units else int(text)


def main() -> int:
    """Run the benchmarks that the command line asks for; returns 1 if any result was wrong."""
    cases = _cases()
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("collectives", nargs="*", metavar="collective", help=f"by default all: {', '.join(cases)}")
    parser.add_argument("--min-bytes", type=_bytes, default=8)
    parser.add_argument("--max-bytes", type=_bytes, default=16 << 20)
    parser.add_argument("--factor", type=int, default=32, help="from one size to the next")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--transports", default="tcp,mpi")
    parser.add_argument("--peers", default="openmpi,mpich,gloo", help="those that can run here are compared with")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.collectives if name not in cases]
    if unknown:
        parser.error(f"there is no benchmark {unknown[0]}; there are: {', '.join(cases)}")
    notes: list[str] = []
    comm, runners = contestants(
        arguments.transports.split(","), [p for p in arguments.peers.split(",") if p], notes.append
    )
    cores = sorted(os.sched_getaffinity(0))
    # Ranks that wake each other may end up on one core, where a peer that spins would wait for the scheduler.
    os.sched_setaffinity(0, {cores[comm.rank % len(cores)]})
    leader = comm.rank == 0
    if leader:
        for note in notes:
            print(f"# {note}")
    rows = []
    for name in arguments.collectives or cases:
        if leader:
            print(
                f"\n# {name}, {comm.size} ranks, median of {arguments.iterations}; ratio = best peer's time ÷ ours\n{HEADER}"
            )
        size = arguments.min_bytes
        while size <= arguments.max_bytes:
            count = max(1, size // 4 // comm.size) * comm.size
            for row in measure(cases[name], count, comm, runners, arguments.iterations):
                rows.append(row)
                if leader:
                    print(line(row), flush=True)
            size *= arguments.factor
            if name == "barrier":
                break
    if leader and arguments.json:
        Path(arguments.json).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
