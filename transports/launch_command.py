"""The command line of the launcher."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from transports.connect import check_launch
from transports.errors import CommunicationError
from transports.launch import OUTPUTS, launch


class OneLineParser(argparse.ArgumentParser):
    """A parser whose refusals are one line, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """End the program with this message."""
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message} (see {self.prog} --help)\n")


def positive(text: str) -> int:
    """The type of an option that is a number from 1."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of seconds")
    return seconds


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    return name, value


def add_run_command(subparsers: argparse._SubParsersAction[OneLineParser]) -> None:
    """Add `run` to a command line."""
    parser = subparsers.add_parser("run", help="start the ranks of a job on this host", usage=(
        "python -m collectives run -n N [options] (script.py | -m module) [arguments …]"
    ))  # fmt: skip
    parser.add_argument("-n", "--ranks", type=positive, required=True, help="number of ranks")
    parser.add_argument(
        "--output", choices=OUTPUTS, default="auto", help="how what the ranks print is shown (default: auto)"
    )
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="end the job after so many seconds")
    parser.add_argument(
        "--grace", type=_seconds, default=5.0, metavar="S", help="seconds from SIGTERM to SIGKILL (default: 5)"
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="threads per rank of numerical libraries (default: cores / ranks)"
    )
    parser.add_argument(
        "--env",
        action="append",
        type=_setting,
        default=[],
        metavar="KEY=VALUE",
        help="a variable for the ranks; may be repeated",
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="run a module, as python -m does")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a Python script and its arguments")
    parser.set_defaults(run=run_from_arguments, parser=parser)


def run_from_arguments(arguments: argparse.Namespace) -> int:
    """Run what the command line says; returns the exit code."""
    program: list[str] = arguments.module or arguments.script
    if not program:
        arguments.parser.error("there is nothing to run: name a script, or a module with -m")
    problem = _problem_of_module(program[0]) if arguments.module else _problem_of_script(program[0])
    if problem:
        arguments.parser.error(problem)
    try:
        check_launch(arguments.ranks, {**os.environ, **dict(arguments.env)})
    except (ValueError, CommunicationError) as error:
        arguments.parser.error(str(error))
    command = [sys.executable, "-u", *(["-m"] if arguments.module else []), *program]
    return launch(
        command,
        arguments.ranks,
        output=arguments.output,
        environment=dict(arguments.env),
        timeout=arguments.timeout,
        grace=arguments.grace,
        threads=arguments.threads,
    )


def _problem_of_script(script: str) -> str | None:
    """Why Python cannot run this script, before any rank is started; None if nothing speaks against it."""
    try:
        if Path(script).is_dir():
            return None if Path(script, "__main__.py").is_file() else f"{script} is a folder without __main__.py"
        with Path(script).open("rb"):
            return None
    except FileNotFoundError:
        return f"there is no script {script}"
    except (OSError, ValueError) as error:
        return f"script {script} cannot be read: {getattr(error, 'strerror', None) or error}"


def _problem_of_module(module: str) -> str | None:
    """The same for a module; importing the packages that it is in may run their code, as `python -m` does."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a parent package is missing, or this is no module's name
        found = None
    except Exception:  # code of a parent package: the ranks show what is wrong with it
        return None
    if found is None:
        return f"there is no module {module}"
    if found.submodule_search_locations is None:
        return None
    for finder in sys.meta_path:
        if finder.find_spec(f"{module}.__main__", found.submodule_search_locations) is not None:
            return None
    return f"module {module} is a package without __main__, which cannot be run"
