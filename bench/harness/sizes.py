"""Which sizes are measured, how often, and how many runs make one measurement."""

from __future__ import annotations

from typing import Final

UNITS: Final = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
DEFAULT: Final = "8,1K,8K,64K,1M,16M,64M"
ODD: Final = (4 * 1009, 4 * 65537, 4 * 1000003)
"""Neither powers of two nor multiples of a page, in bytes."""

LARGE: Final = 4 << 20
"""From so many bytes one measurement is one run, and it is that run whose result is checked."""
_SECONDS: Final = 0.01
_MOST: Final = 1000
_ITERATIONS: Final = ((64 << 10, 15), (LARGE - 1, 9), (32 << 20, 5))
_FEWEST: Final = 3


def parse(text: str) -> list[int]:
    """Sizes in bytes from a list such as `8,64K,1M`; raises ValueError naming what is not a size."""
    return [_size(part.strip()) for part in text.split(",")]


def _size(text: str) -> int:
    number, unit = (text[:-1], UNITS[text[-1].upper()]) if text[-1:].upper() in UNITS else (text, 1)
    if not number.isdigit() or not int(number):
        raise ValueError(f"{text!r} is not a size; expected bytes as in 8, 64K, 1M")
    return int(number) * unit


def label(nbytes: int) -> str:
    """The size as `parse` reads it, as short as it goes."""
    for unit, factor in reversed(UNITS.items()):
        if nbytes % factor == 0:
            return f"{nbytes // factor}{unit}"
    return str(nbytes)


def iterations(nbytes: int) -> int:
    """How often a size is measured unless the command line says: the larger, the less noise, and the longer it takes."""
    return next((number for limit, number in _ITERATIONS if nbytes <= limit), _FEWEST)


def repeats(seconds: float) -> int:
    """How many runs in a row make one measurement, when one run takes about `seconds`: 10 ms in all, at most 1000 runs."""
    return max(1, min(_MOST, round(_SECONDS / max(seconds, 1e-9))))
