"""What a link costs: a few numbers for each transport, measured by `python -m collectives tune` and kept in a file."""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_VERSION: Final = 1


class CostsError(ValueError):
    """A file of costs cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class LinkCosts:
    """Seconds, as in the LogGP model (Alexandrov et al., 1995); a message of n bytes takes latency + message + n·byte."""

    call: float
    """What every call costs once, whatever it does."""
    latency: float
    """α: from the end of sending to the beginning of receiving."""
    message: float
    """That a rank is busy for each message, or slice of one, that it sends; receiving is alike."""
    byte: float
    """β: for each byte sent while as many are received."""
    reduced_byte: float
    """γ: for each byte added to another, or copied."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise CostsError(f"{name} is {value!r}; expected seconds, 0 or more")

    def __str__(self) -> str:
        return (
            f"call {self.call * 1e6:.1f} µs, latency α {self.latency * 1e6:.1f} µs, message {self.message * 1e6:.1f} µs, "
            f"β {self.byte * 1e9:.3f} ns/B, γ {self.reduced_byte * 1e9:.3f} ns/B"
        )


DEFAULTS: Final[Mapping[str, LinkCosts]] = {
    "inproc": LinkCosts(100e-6, 20e-6, 30e-6, 0.2e-9, 0.15e-9),
    "tcp": LinkCosts(57e-6, 6e-6, 9e-6, 0.51e-9, 0.07e-9),
    "mpi": LinkCosts(57e-6, 0.0, 15e-6, 0.22e-9, 0.07e-9),
    "shm": LinkCosts(0.2e-6, 0.1e-6, 0.0, 0.08e-9, 0.07e-9),
}
"""Two ranks on a virtual machine with 2 cores (Intel Xeon with AVX-512), by `python -m collectives tune`."""


def default_costs(transport: str) -> LinkCosts:
    """The built-in costs of a transport; those of TCP for one that has none."""
    return DEFAULTS.get(transport, DEFAULTS["tcp"])


def load(path: Path) -> dict[str, LinkCosts]:
    """The costs kept in a file, by transport; empty where there is no file. Raises CostsError for one that is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CostsError(
            f"{path} cannot be read ({error}); remove it, or run `python -m collectives tune` again"
        ) from None
    try:
        if document["version"] != _VERSION:
            raise CostsError(f"version is {document['version']!r}, expected {_VERSION}")
        names = [field.name for field in fields(LinkCosts)]
        return {name: LinkCosts(*(costs[key] for key in names)) for name, costs in document["transports"].items()}
    except (CostsError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CostsError(
            f"{path} is damaged ({reason}); remove it, or run `python -m collectives tune` again"
        ) from None


def save(path: Path, costs: Mapping[str, LinkCosts]) -> None:
    """Keep the costs in a file, beside those of other transports that are there, whole or not at all."""
    try:
        kept = load(path)
    except CostsError:
        kept = {}
    kept.update(costs)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"version": _VERSION, "transports": {k: asdict(v) for k, v in kept.items()}}, file, indent=1)
            file.write("\n")
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def costs_file(cache: Path) -> Path:
    """Where the costs are kept in the user's cache folder."""
    return cache / "collectives" / "tune.json"


def known_costs(cache: Path, transport: str, rank: int) -> LinkCosts:
    """The costs kept for the transport, or the built-in ones; rank 0 warns of a damaged file."""
    costs = default_costs(transport)
    try:
        return load(costs_file(cache)).get(transport, costs)
    except CostsError as error:
        if rank == 0:
            warnings.warn(f"{error}; the built-in costs serve until then", RuntimeWarning, stacklevel=3)
        return costs


def agree_on_costs(cache: Path, transport: str, rank: int, broadcast: Callable[[Array], object]) -> LinkCosts:
    """The costs that rank 0 knows for the transport, on all ranks, so that all choose alike; `broadcast` is from rank 0."""
    numbers = np.array(astuple(known_costs(cache, transport, rank) if rank == 0 else default_costs(transport)))
    broadcast(numbers)
    return LinkCosts(*numbers.tolist())
