"""The command line of the launcher."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from transports.launch import OUTPUTS, launch

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_run_command(subparsers: Subparsers) -> None:
    """Add `run` to a command line."""
    parser = subparsers.add_parser("run", help="start the ranks of a job on this host", usage=(
        "python -m collectives run -n N [options] (script.py | -m module) [arguments …]"
    ))  # fmt: skip
    parser.add_argument("-n", "--ranks", type=int, required=True, help="number of ranks")
    parser.add_argument(
        "--output", choices=OUTPUTS, default="auto", help="how what the ranks print is shown (default: auto)"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="end the job after so many seconds")
    parser.add_argument(
        "--grace", type=float, default=5.0, metavar="S", help="seconds from SIGTERM to SIGKILL (default: 5)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads per rank of numerical libraries (default: cores / ranks)"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="KEY=VALUE", help="a variable for the ranks; may be repeated"
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as python -m does")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a Python script and its arguments")
    parser.set_defaults(run=run_from_arguments, parser=parser)


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Run what the command line says; returns the exit code."""
    program: list[str] = arguments.module or arguments.script
    if not program:
        arguments.parser.error("there is nothing to run: name a script, or a module with -m")
    if not arguments.module and not Path(program[0]).is_file():
        arguments.parser.error(f"there is no script {program[0]}")
    for setting in arguments.env:
        if "=" not in setting:
            arguments.parser.error(f"--env {setting}: expected KEY=VALUE")
    command = [sys.executable, "-u", *(["-m"] if arguments.module else []), *program]
    return launch(
        command,
        arguments.ranks,
        output=arguments.output,
        environment=dict(setting.split("=", 1) for setting in arguments.env),
        timeout=arguments.timeout,
        grace=arguments.grace,
        threads=arguments.threads,
    )
