"""Random numbers by name and index: element i of a stream depends on (seed, name, i) and on nothing else.

Therefore a rank can draw any slice of any stream without the rest, and initial weights, data order and
sampling do not depend on the number of ranks. The generator is Philox-4x64-10 (Salmon 2011), keyed by sha256
of seed and name.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

_WORDS_A_BLOCK = 4


def bits(seed: int, name: str, start: int, stop: int) -> npt.NDArray[np.uint64]:
    """Return elements start … stop − 1 of the stream of 64-bit words that belongs to `seed` and `name`."""
    if not 0 <= start <= stop:
        raise ValueError(f"a slice of stream {name!r} needs 0 <= start <= stop, got [{start}, {stop})")
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")
    generator = np.random.Philox(key=key)
    block, offset = divmod(start, _WORDS_A_BLOCK)
    generator.advance(block)
    words: npt.NDArray[np.uint64] = generator.random_raw(offset + stop - start)
    return words[offset:]


def uniform(seed: int, name: str, start: int, stop: int) -> npt.NDArray[np.float64]:
    """Return elements start … stop − 1 of a stream of numbers uniform in [0, 1), with 53 random bits each."""
    return (bits(seed, name, start, stop) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(seed: int, name: str, start: int, stop: int, bound: int) -> npt.NDArray[np.int64]:
    """Return elements start … stop − 1 of a stream of integers in [0, bound), biased below bound / 2⁶⁴."""
    if bound < 1:
        raise ValueError(f"stream {name!r}: integers in [0, {bound}) do not exist")
    return (bits(seed, name, start, stop) % np.uint64(bound)).astype(np.int64)


def normal(seed: int, name: str, start: int, stop: int) -> npt.NDArray[np.float64]:
    """Return elements start … stop − 1 of a stream of standard normal numbers (Box and Muller 1958).

    Each number is made of the two 32-bit halves of one 64-bit word, so that the index of a number is that of
    its word.
    """
    words = bits(seed, name, start, stop)
    radius = ((words >> np.uint64(32)).astype(np.float64) + 1) * 2.0**-32
    angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0**-32 * 2 * np.pi)
    normals: npt.NDArray[np.float64] = np.sqrt(-2 * np.log(radius)) * np.cos(angle)
    return normals
