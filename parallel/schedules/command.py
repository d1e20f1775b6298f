"""`python -m parallel schedules list | show`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parallel.report import check_plotting, table
from parallel.schedules.drawing import draw
from parallel.schedules.proof import most_in_flight, verify
from parallel.schedules.registry import SCHEDULES, SYMBOLS, build, expected_idle, find
from parallel.schedules.timing import times

if TYPE_CHECKING:
    import argparse


def add_command(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `schedules` and what it can do to the command line; the function to call is left in `run`."""
    what = "the pipeline schedules: list them, or show one"
    schedules = commands.add_parser("schedules", help=what, description=f"{what[0].upper()}{what[1:]}.")
    actions = schedules.add_subparsers(required=True, metavar="list | show")
    listing = actions.add_parser("list", help="every schedule with its formulas")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="verify a schedule and print it, with its idle time and memory")
    show.add_argument("schedule", help="a name that `list` gives")
    show.add_argument("--stages", type=int, default=4, metavar="P", help="ranks of the pipeline (default: 4)")
    show.add_argument("--micro-batches", type=int, default=8, metavar="M", help="micro-batches of a step (default: 8)")
    show.add_argument("--chunks", type=int, metavar="V", help="chunks of the model on each rank")
    show.add_argument("--out", metavar="FILE", help="draw it: a .png, .svg or .pdf")
    show.set_defaults(run=_show)


def _list(arguments: argparse.Namespace) -> None:
    rows = [("schedule", "chunks", "idle time of a rank", "if", "most chunks in flight")]
    for recipe in SCHEDULES.values():
        chunks = "any" if recipe.any_chunks else str(recipe.chunks)
        condition = "" if recipe.idle_if.text == "True" else str(recipe.idle_if)
        rows.append((recipe.name, chunks, str(recipe.idle), condition, str(recipe.in_flight)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{SYMBOLS}")
    for recipe in SCHEDULES.values():
        print(f"{recipe.name:12} {recipe.summary}")


def _show(arguments: argparse.Namespace) -> None:
    recipe = find(arguments.schedule)
    if arguments.out is not None:
        check_plotting(arguments.out, "--out")
    schedule = build(recipe.name, arguments.stages, arguments.micro_batches, arguments.chunks)
    verify(schedule)
    plan = times(schedule)
    print(schedule, end="\n\n")
    rows = [("rank", "work", "idle", "of the whole", "of the ideal", "in flight", "")]
    for rank in range(schedule.ranks):
        idle, work = plan.idle(rank), plan.work(rank)
        held = most_in_flight(schedule, rank)
        cells = (f"{float(idle):g}", f"{float(idle / plan.period):.1%}", f"{float(idle / work):.1%}", str(held))
        rows.append((str(rank), f"{float(work):g}", *cells, ""))
    print(table(rows))
    formula = expected_idle(recipe.name, schedule.ranks, schedule.chunks, micro_batches=schedule.micro_batches)
    print(
        f"\nTimes in forwards of a micro-batch on a rank, with F = B_i = W = 1. A step takes {float(plan.period):g} where step "
        f"follows step, and {float(plan.total):g} until the last rank has finished.\n"
        f"Idle by the formula {recipe.idle}: {float(formula):g}; shares are of the whole time, idle / (work + idle), and of "
        "the ideal time, idle / work. In flight are micro-batches, counted in each chunk of a rank."
    )
    if arguments.out is not None:
        draw(arguments.out, schedule)
        print(f"wrote {arguments.out}")
