"""Which algorithms there are for each collective."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from collectives.schedule import Schedule
from collectives.spec import COLLECTIVES


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A registered algorithm: `make(size, root)` returns its schedule."""

    collective: str
    name: str
    make: Callable[[int, int], Schedule]
    in_place: bool
    """Whether it may run with input and output in the same memory, as `Collective.in_place` says."""

    @property
    def summary(self) -> str:
        """The first sentence of the function's docstring."""
        return (self.make.__doc__ or "").strip().partition("\n")[0]

    def schedule(self, size: int, root: int = 0) -> Schedule:
        """The schedule for `size` ranks, made once and kept."""
        return _schedule(self, size, root)


_REGISTRY: dict[tuple[str, str], Algorithm] = {}


@lru_cache(maxsize=512)
def _schedule(entry: Algorithm, size: int, root: int) -> Schedule:
    return entry.make(size, root)


def algorithm(
    collective: str, name: str, *, in_place: bool = True
) -> Callable[[Callable[[int, int], Schedule]], Callable[[int, int], Schedule]]:
    """Register the decorated function as algorithm `name` of `collective`."""
    if collective not in COLLECTIVES:
        raise ValueError(f"unknown collective {collective!r}; expected one of {', '.join(COLLECTIVES)}")

    def register(make: Callable[[int, int], Schedule]) -> Callable[[int, int], Schedule]:
        if (collective, name) in _REGISTRY:
            raise ValueError(f"{collective} has an algorithm {name!r} already")
        _REGISTRY[collective, name] = Algorithm(collective, name, make, in_place)
        return make

    return register


@lru_cache(maxsize=1)
def _load() -> None:
    package = importlib.import_module("collectives.algorithms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def registered(collective: str | None = None) -> list[Algorithm]:
    """All algorithms, or those of one collective, sorted by collective (in the order of the spec) and name."""
    _load()
    order = list(COLLECTIVES)
    entries = sorted(_REGISTRY.values(), key=lambda entry: (order.index(entry.collective), entry.name))
    return [entry for entry in entries if collective in (None, entry.collective)]


def find(collective: str, name: str) -> Algorithm:
    """The algorithm of that name; raises ValueError listing those that exist."""
    _load()
    try:
        return _REGISTRY[collective, name]
    except KeyError:
        if collective not in COLLECTIVES:
            raise ValueError(f"unknown collective {collective!r}; expected one of {', '.join(COLLECTIVES)}") from None
        names = ", ".join(entry.name for entry in registered(collective))
        raise ValueError(f"{collective} has no algorithm {name!r}; it has: {names}") from None
