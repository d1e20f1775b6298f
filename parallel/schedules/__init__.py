"""Pipeline schedules: one pure function a file that returns a frozen, printable table, found by itself.

A function takes (ranks, micro_batches, chunks) and returns a `Schedule`; the decorator `schedule` registers it with its
published formulas. Every module of this package is imported here, so that adding a schedule adds one file and touches none.
"""

from importlib import import_module
from pkgutil import iter_modules

from parallel.schedules.actions import Action, Kind
from parallel.schedules.errors import ScheduleError
from parallel.schedules.proof import most_in_flight, verify
from parallel.schedules.registry import SCHEDULES, Recipe, build, expected_idle, expected_in_flight, find
from parallel.schedules.table import Schedule
from parallel.schedules.timing import Times, times

__all__ = [
    "SCHEDULES",
    "Action",
    "Kind",
    "Recipe",
    "Schedule",
    "ScheduleError",
    "Times",
    "build",
    "expected_idle",
    "expected_in_flight",
    "find",
    "most_in_flight",
    "times",
    "verify",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
