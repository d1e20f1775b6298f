"""`python -m parallel train | stages | export | schedules`: train a GPT across ranks, and what goes with it."""

from __future__ import annotations

import argparse
import io
import math
import os
import signal
import sys
import time
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import collectives
from collectives.start import check_launch, launched_rank
from parallel.configuration import ConfigurationError, TrainingConfiguration
from parallel.job import run
from parallel.mesh import MeshError, parse_layout
from parallel.request import USAGE_ERROR, USAGE_ERRORS, Options, complain, prepare
from parallel.schedules.command import add_command as add_schedules_command

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_HELP = {
    "layers": "transformer layers",
    "hidden": "width of the model",
    "heads": "attention heads, which divide the width",
    "kv_heads": "heads of keys and values, each shared by a group of the heads (default: as many as heads)",
    "seq": "bytes in a sequence",
    "batch": "sequences in the global batch of a step",
    "micro_batches": "parts that each rank computes one after the other",
    "steps": "optimizer steps",
    "lr": "peak learning rate",
    "warmup": "steps until the peak; a cosine to a tenth of it follows (default: 50, at most a tenth of the steps)",
    "weight_decay": "decoupled weight decay of the matrices",
    "clip": "largest gradient norm, 0 for no clipping",
    "dropout": "probability with which elements are dropped in training",
    "dtype": "float32, float64, or bfloat16 and float16 with float32 masters",
    "zero": "stage of ZeRO: 0 none, 1 shards the optimizer, 2 the gradients too, 3 the parameters too",
    "replicas": "groups of ranks that each hold one sharded model (HSDP)",
    "keep_parameters": "with stage 3, keep gathered parameters until backward",
    "recompute": "keep only the inputs of layers for backward, and compute the rest again",
    "sequence_parallel": "share the positions among the tensor-parallel ranks where layers are not cut",
    "schedule": "of the pipeline: gpipe, 1f1b, interleaved, zb-h1 or zb-v",
    "chunks": "stages a rank has in the pipeline; 0 for as many as is usual with the schedule",
    "stage_layers": "layers of each stage, such as 3,5; balanced by measured cost by default",
    "exact": "sum in an order that depends on no layout: the same bits on any number of ranks",
    "seed": "of weights, data order and sampling",
    "validation_batches": "global batches on which validation is measured",
}


_AXES = ("tp", "pp", "cp")
"""Fields of the configuration that --layout gives."""

_HEAD_START_SECONDS = 1.0
"""Launchers end all ranks when the first one fails; rank 0 should have spoken by then."""


class JoinError(Exception):
    """This process cannot become a rank; the message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _refuse(f"{message} (see {self.prog} --help)")
        self.exit(USAGE_ERROR)


def _refuse(text: str) -> None:
    """Say what is wrong with the request; only rank 0 does where a launcher has made the same one of several ranks."""
    try:
        rank = launched_rank()
    except collectives.RendezvousError:
        rank = 0
    if rank == 0:
        complain(text)
    else:
        time.sleep(_HEAD_START_SECONDS)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m parallel", description="Train models across ranks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("train", "train a GPT on bytes"),
        ("stages", "train under every stage of ZeRO for --steps steps, and compare time, communication and memory"),
    ):
        described = f"{what[0].upper()}{what[1:]}, under a launcher or with ranks of its own."
        command = commands.add_parser(
            name, help=what, description=described, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        _add_training(command)
        if name == "train":
            _add_files(command)
    export = commands.add_parser(
        "export",
        help="merge a checkpoint into one safetensors file",
        description="Merge the latest checkpoint into one file.",
    )
    export.add_argument("folder", help="where checkpoints are kept")
    export.add_argument("file", help="the safetensors file to write")
    export.add_argument("--everything", action="store_true", help="the optimizer's state as well")
    add_schedules_command(commands)
    return parser


def _add_training(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "--layout",
        default="dp4",
        help="axes of the mesh and their ranks, such as dp2,tp2,pp2: dp shares each batch, tp cuts layers, pp has stages of "
        "layers, cp cuts sequences",
    )
    train.add_argument(
        "--data", required=True, help="a file, a folder, or stdlib: the sources of Python's standard library"
    )
    for field in fields(TrainingConfiguration):
        if field.name in _AXES:
            continue
        flag, kind = f"--{field.name.replace('_', '-')}", int if field.default is None else type(field.default)
        if kind is bool:
            train.add_argument(flag, action="store_true", help=_HELP[field.name])
            continue
        # These two depend on other flags by default.
        default = argparse.SUPPRESS if field.name in ("warmup", "kv_heads") else field.default
        train.add_argument(flag, type=kind, default=default, metavar="N", help=_HELP[field.name])
    train.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of matrix products a rank; cores over local ranks, 1 with --exact",
    )


def _add_files(train: argparse.ArgumentParser) -> None:
    train.add_argument("--save", metavar="FOLDER", help="keep checkpoints there, written while training goes on")
    train.add_argument("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints")
    train.add_argument("--keep", type=int, metavar="N", help="checkpoints that are kept; all by default")
    train.add_argument("--resume", metavar="FOLDER", help="go on from the latest checkpoint there, of any layout")
    train.add_argument("--trace", metavar="FILE", help="write a Chrome trace of all ranks, for Perfetto")
    train.add_argument("--trace-plot", metavar="FILE", help="draw the last two steps of the trace")
    train.add_argument("--timeline", metavar="FILE", help="draw the last step of the pipeline under its plan")
    train.add_argument("--report", metavar="FILE", help="write a JSON with every number of the run")
    train.add_argument("--plot", metavar="FILE", help="draw the losses")
    train.add_argument("--generate", type=int, default=0, metavar="N", help="bytes to generate at the end")
    train.add_argument(
        "--compare-steps",
        type=int,
        default=0,
        metavar="N",
        help="steps that rank 0 repeats alone, to compare the losses",
    )


def _options(arguments: argparse.Namespace) -> Options:
    warmup = min(TrainingConfiguration.warmup, max(1, arguments.steps // 10))
    given = {"warmup": warmup, "kv_heads": None, **vars(arguments)}
    try:
        sizes = parse_layout(arguments.layout)
    except MeshError as error:
        raise ConfigurationError(str(error)) from error
    given.update({axis: sizes[axis] for axis in _AXES})
    training = TrainingConfiguration(**{field.name: given[field.name] for field in fields(TrainingConfiguration)})
    others: dict[str, Any] = {
        field.name: getattr(arguments, field.name, field.default)
        for field in fields(Options)
        if field.name not in ("ranks", "training", "stages")
    }
    stages = arguments.command == "stages"
    return Options(ranks=math.prod(sizes.values()), training=training, stages=stages, **others)


def _join(ranks: int) -> collectives.Communicator | None:
    """Return the communicator of this rank, or None in a process that is to start the ranks, which nothing prevents."""
    try:
        if ranks == 1 or collectives.under_launcher():
            return collectives.init()
        check_launch(ranks)
        return None
    except ValueError as error:  # a setting, which all ranks have alike
        raise ConfigurationError(str(error)) from error
    except (collectives.CommunicationError, OSError) as error:
        raise JoinError(str(error)) from error


def _end(rank: int, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say in one line what other ranks, the machine or the user caused; anything else is a fault of the program."""
    match error:
        case KeyboardInterrupt():
            text = "interrupted"
        case MemoryError():
            text = f"out of memory: {error}".rstrip(": ")
        case collectives.CommunicationError() | OSError():
            text = f"{kind.__name__}: {error}"
        case _:
            return sys.__excepthook__(kind, error, trace)
    complain(f"rank {rank}: {text}")
    if isinstance(error, OSError):  # what could not be written then is not to be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _export(arguments: argparse.Namespace) -> int:
    from parallel import checkpoint

    try:
        checkpoint.export(arguments.folder, arguments.file, everything=arguments.everything)
    except (checkpoint.CheckpointError, OSError) as error:
        complain(str(error))
        return USAGE_ERROR
    print(f"wrote {arguments.file}")
    return 0


def _schedules(arguments: argparse.Namespace) -> int:
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left of it is not to be tried again at exit
        return 128 + signal.SIGPIPE
    except (ValueError, OSError) as error:
        complain(str(error))
        return USAGE_ERROR
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for a run that failed its own checks, or 2 for a wrong request.

    To be called by a process that then ends: what a rank raises reaches the interpreter, so that the other
    ranks learn of it, and is printed there in a line.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    if arguments.command == "export":
        return _export(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # generated text may hold any letter
    if arguments.command == "schedules":
        return _schedules(arguments)
    try:
        options = _options(arguments)
        communicator = _join(options.ranks)
        if communicator is None:
            prepare(options)
    except USAGE_ERRORS as error:
        _refuse(str(error))
        return USAGE_ERROR
    except JoinError as error:
        complain(str(error))
        return USAGE_ERROR
    if communicator is None:
        return collectives.launch([sys.executable, "-m", "parallel", *argv], options.ranks, output="rank0")
    sys.excepthook = partial(_end, communicator.rank)
    with communicator:
        return run(options, communicator)


if __name__ == "__main__":
    sys.exit(main())
