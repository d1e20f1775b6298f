"""A corpus of bytes, its training and validation parts, and batches whatever the number of ranks."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from parallel.random import integers

if TYPE_CHECKING:
    from collections.abc import Iterator

Bytes = npt.NDArray[np.uint8]

STANDARD_LIBRARY = "stdlib"
_VALIDATION_ONE_IN = 20
_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


class DataError(ValueError):
    """The data cannot serve for this training; the message says why."""


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, in two parts that share nothing."""

    training: Bytes
    validation: Bytes
    files: int

    def check(self, sequence: int) -> None:
        """Raise DataError unless both parts hold a window of `sequence` bytes and the byte after it."""
        for name, part in (("training", self.training), ("validation", self.validation)):
            if len(part) < sequence + 1:
                raise DataError(
                    f"the {name} part of the corpus has {len(part)} bytes, too few for sequences of "
                    f"{sequence} and the byte that follows; give more data or a smaller --seq"
                )

    @cached_property
    def digest(self) -> str:
        """The sha256 of both parts."""
        parts = (hashlib.sha256(part.data).digest() for part in (self.training, self.validation))
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def batch(self, seed: int, step: int, samples: range, sequence: int) -> Bytes:
        """Return training windows (len(samples), sequence + 1) for these global sample numbers."""
        starts = integers(seed, f"data order/{step}", samples.start, samples.stop, bound=len(self.training) - sequence)
        return _windows(self.training, starts, sequence)

    def validation_batch(self, windows: int, samples: range, sequence: int) -> Bytes:
        """Return some of `windows` windows (…, sequence + 1) spread evenly over the validation part."""
        last = len(self.validation) - sequence - 1
        starts = np.array([number * last // max(1, windows - 1) for number in samples], np.int64)
        return _windows(self.validation, starts, sequence)


def _windows(text: Bytes, starts: npt.NDArray[np.int64], sequence: int) -> Bytes:
    windows: Bytes = text[starts[:, None] + np.arange(sequence + 1)]
    return windows


def _walk(root: Path, without: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield all regular files below `root`, but not those in folders named in `without`."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in without]
        yield from (path for name in names if (path := Path(folder, name)).is_file())


def load(source: str) -> Corpus:
    """Read a file, a folder (all its files, sorted by path), or `stdlib`: this Python's standard library.

    Of several files about one in twenty, chosen by a hash of its relative path, is for validation; of a
    single file its end. Raises DataError if there is nothing there.
    """
    if source == STANDARD_LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in _walk(root, without=_NOT_LIBRARY) if path.suffix == ".py"]
    else:
        root = Path(source)
        if not source or not root.exists():
            raise DataError(f"--data {source}: no such file or folder; give a file, a folder or {STANDARD_LIBRARY!r}")
        if not (root.is_dir() or root.is_file()):  # a pipe or a device might never end
            raise DataError(f"--data {source}: neither a file nor a folder; save its content to a file first")
        files = list(_walk(root)) if root.is_dir() else [root]
    training: list[bytes] = []
    validation: list[bytes] = []
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        try:
            text = path.read_bytes()
        except OSError as error:
            raise DataError(f"--data {source}: cannot read {path}: {error.strerror}") from error
        held_out = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "little") % _VALIDATION_ONE_IN == 0
        (validation if held_out else training).append(text)
    parts = [b"".join(training), b"".join(validation)]
    if not (parts[0] or parts[1]):
        raise DataError(f"--data {source}: the corpus is empty ({len(files)} files, 0 bytes)")
    if not (parts[0] and parts[1]):
        whole = parts[0] or parts[1]
        cut = len(whole) - len(whole) // _VALIDATION_ONE_IN
        parts = [whole[:cut], whole[cut:]]
    return Corpus(np.frombuffer(parts[0], np.uint8), np.frombuffer(parts[1], np.uint8), len(files))


def unigram_loss(corpus: Corpus) -> float:
    """Return the validation loss (nats a byte) of a model that knows the training byte frequencies only."""
    counts: npt.NDArray[Any] = np.bincount(corpus.training, minlength=256) + 1.0
    observed = np.bincount(corpus.validation, minlength=256)
    return float(-(observed * np.log(counts / counts.sum())).sum() / observed.sum())
