"""The command line: `python -m collectives run | list | show | verify | tune`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

import kernels
from collectives.algorithms import find, registered
from collectives.errors import ScheduleError
from collectives.spec import COLLECTIVES
from collectives.tune import tune
from collectives.verify import verify_algorithm
from transports.connect import available
from transports.launch_command import OneLineParser, add_run_command, positive


def markdown_table() -> str:
    """The README's table of algorithms and where they run."""
    lines = ["| collective | over inproc, tcp, mpi | over shm |", "|---|---|---|"]
    for collective in COLLECTIVES:
        names = ", ".join(entry.name for entry in registered(collective))
        mapped = "one_hop to 8 KiB, then direct" if collective == "all_reduce" else "direct"
        lines.append(f"| {collective} | {names} | {mapped} |")
    return "\n".join(lines)


def _list(arguments: argparse.Namespace) -> int:
    if arguments.markdown:
        print(markdown_table())
        return 0
    rows = [(entry.collective, entry.name, entry.summary) for entry in registered()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print("collective".ljust(widths[0]), "algorithm".ljust(widths[1]), "how", sep="  ")
    for collective, name, summary in rows:
        print(collective.ljust(widths[0]), name.ljust(widths[1]), summary, sep="  ")
    print("\ntransports")
    for name, serves, reason in available():
        print(f"  {name:9} {'yes' if serves else 'no ':3}  {reason}")
    print(f"\nkernels: {kernels.backend()}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    names = [entry.name for entry in registered(arguments.collective)]
    if arguments.collective not in COLLECTIVES:
        find(arguments.collective, "")
    if not 0 <= arguments.root < arguments.ranks:
        raise ValueError(f"--root is {arguments.root}; expected a rank, 0 to {arguments.ranks - 1}")
    for name in [arguments.algorithm] if arguments.algorithm else names:
        print(find(arguments.collective, name).schedule(arguments.ranks, arguments.root), end="\n\n")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    failed = 0
    for entry in registered(arguments.collective):
        for size in range(1, arguments.ranks + 1):
            try:
                proof = verify_algorithm(entry, size)
            except ScheduleError as error:
                failed += 1
                print(f"{entry.collective} by {entry.name}, {size} ranks: {error}", file=sys.stderr)
                break
        else:
            print(
                f"{entry.collective:15} {entry.name:14} proved for 1 to {arguments.ranks} ranks; "
                f"at {arguments.ranks}: {proof.steps} steps, {proof.messages} messages"
            )
    return 1 if failed else 0


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        try:
            return _run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left of it is not to be tried again at exit
        return 128 + signal.SIGPIPE


def _run() -> int:
    parser = OneLineParser(prog="python -m collectives", description="Collective communication between ranks.")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_run_command(commands)
    listing = commands.add_parser("list", help="the algorithms, transports and kernels that are here")
    listing.add_argument("--markdown", action="store_true", help="as the table of the README")
    listing.set_defaults(run=_list)
    show = commands.add_parser("show", help="print a schedule as a table")
    show.add_argument("collective")
    show.add_argument("algorithm", nargs="?", help="by default all of the collective")
    show.add_argument("-n", "--ranks", type=positive, default=4)
    show.add_argument("--root", type=int, default=0)
    show.set_defaults(run=_show)
    check = commands.add_parser("verify", help="prove the schedules for every number of ranks")
    check.add_argument("collective", nargs="?", choices=list(COLLECTIVES), help="by default all")
    check.add_argument("-n", "--ranks", type=positive, default=17, help="the largest number of ranks (default: 17)")
    check.set_defaults(run=_verify)
    tuning = commands.add_parser("tune", help="measure what messages cost here, to choose algorithms by")
    tuning.set_defaults(run=tune)
    arguments = parser.parse_args()
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
