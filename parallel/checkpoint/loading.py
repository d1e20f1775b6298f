"""Loading: what a rank wants is looked up in the manifest and copied from the files that have it, whoever wrote them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.autograd import array_module
from parallel.checkpoint.agreement import Attempt, CheckpointError, agree
from parallel.checkpoint.dtypes import check_conversion, check_dtype, convert
from parallel.checkpoint.folder import locate
from parallel.checkpoint.manifest import NAME, Manifest, Stored
from parallel.checkpoint.pieces import Box, Overlaps, Part, Piece, Region, uncovered
from parallel.checkpoint.tensor_file import Entry, TensorFile, ordered, reading, write, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy.typing as npt

    from collectives import Communicator


def load(
    directory: str | os.PathLike[str],
    communicator: Communicator,
    pieces: Sequence[Piece],
    *,
    step: int | None = None,
    verify: bool = True,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """Fill the values of the pieces from a checkpoint, together with all ranks; returns its metadata.

    Ranks, boxes, ranges and dtypes may be others than those that were saved. Values of an equal dtype are the
    same bits; others are rounded once. Only what the pieces need is read from the files, each element once.

    Arguments: `pieces`, what this rank wants, maybe nothing; `step`, by default the latest; `verify`, whether
    the ranks check every file that any of them needs against its checksum first, each file on one rank;
    `check`, called with the metadata before anything is read, which may raise CheckpointError to refuse it.

    Raises CheckpointError, with the same words on all ranks, if anything is wrong on any of them; the values
    are then as they were, unless reading itself failed.
    """
    attempt = Attempt()
    folder = ""
    if communicator.rank == 0:
        with attempt:
            folder = locate(directory, step).name
    folder = agree(communicator, attempt, folder)[0]

    checkpoint: Checkpoint | None = None
    seen = ""
    with attempt:
        checkpoint = Checkpoint(Path(directory) / folder)
        seen = checkpoint.digest
        if check is not None:
            check(checkpoint.manifest.metadata)
    everyone = agree(communicator, attempt, seen)
    differing = [rank for rank, other in enumerate(everyone) if other != everyone[0]]
    if differing:
        raise CheckpointError(
            f"rank {differing[0]} sees another {NAME} in {folder} than rank 0; all ranks must be "
            "given the same directory, on a file system that all hosts share"
        )

    assert checkpoint is not None
    copies: list[_Copy] = []
    with attempt:
        copies = [copy for piece in pieces for copy in checkpoint.plan(piece)]
        checkpoint.check_sizes(copies)
    needed = agree(communicator, attempt, sorted({copy.stored.file for copy in copies}))
    if verify:
        files = sorted({file for some in needed for file in some})
        with attempt:
            checkpoint.verify(files[communicator.rank :: communicator.size])
        agree(communicator, attempt)
    with attempt:
        checkpoint.fill(pieces, copies)
    agree(communicator, attempt)
    return checkpoint.manifest.metadata


def read_metadata(directory: str | os.PathLike[str], step: int | None = None) -> Any:
    """Return what was saved as metadata with a step, by default the latest; raises CheckpointError."""
    return Checkpoint(locate(directory, step)).manifest.metadata


def export(
    directory: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    step: int | None = None,
    everything: bool = False,
) -> None:
    """Merge a checkpoint into one safetensors file of whole tensors, checked, one tensor in memory at a time.

    Arguments: `step`, by default the latest; `everything`, whether to take also what is no parameter, which
    is what has a slash in its name, such as "optimizer.first_moment/blocks.0.attention.weight".

    Raises CheckpointError. The file takes its place whole or not at all.
    """
    checkpoint, target = Checkpoint(locate(directory, step)), Path(file)
    checkpoint.verify(sorted(checkpoint.manifest.files))
    entries = ordered(
        Entry(name, tensor.dtype, tensor.shape)
        for name, tensor in checkpoint.tensors.items()
        if everything or "/" not in name
    )
    metadata = {"step": str(checkpoint.manifest.step), "metadata": json.dumps(checkpoint.manifest.metadata)}
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        write(temporary, entries, map(checkpoint.tensor, entries), metadata)
        with writing(target):
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


class _Tensor:
    """What a checkpoint holds of one tensor."""

    def __init__(self, region: Region) -> None:
        self.shape, self.dtype = region.shape, region.dtype
        self.stored: list[Stored] = []

    def parts(self) -> tuple[list[tuple[Stored, Part]], Overlaps]:
        """Return the boxes of all its pieces, and a way to find those that overlap another."""
        parts = [(stored, part) for stored in self.stored for part in stored.region.parts()]
        return parts, Overlaps([part.box for _, part in parts], len(self.shape))


@dataclass(frozen=True)
class _Copy:
    """Elements to be copied: `boxes` of those that `source`, in a file, and `target`, in the piece, have in common.

    Elements of `common` that are in no box have been copied from another file and must be equal.
    """

    piece: Piece
    target: Part
    stored: Stored
    source: Part
    common: Box
    boxes: list[Box]


class Checkpoint:
    """A checkpoint on the disk, opened by one rank; raises CheckpointError if it cannot be read or is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / NAME
        with reading(path):
            text = path.read_bytes()
        self.digest = hashlib.sha256(text).hexdigest()
        self.manifest = Manifest.parse(text.decode(errors="replace"), path)
        self.tensors: dict[str, _Tensor] = {}
        for stored in self.manifest.pieces:
            self.tensors.setdefault(stored.region.name, _Tensor(stored.region)).stored.append(stored)

    def verify(self, files: Iterable[str]) -> None:
        """Read these files whole and compare them with their checksums."""
        for file in files:
            self.manifest.files[file].check(self.folder / file)

    def check_sizes(self, copies: Iterable[_Copy]) -> None:
        """Check that the files of these copies are there and have their sizes."""
        for file in sorted({copy.stored.file for copy in copies}):
            self.manifest.files[file].check_size(self.folder / file)

    def plan(self, piece: Piece) -> Iterator[_Copy]:
        """Yield the copies that fill a piece; raises CheckpointError if the checkpoint does not have all of it."""
        wanted = piece.region()
        tensor = self.tensors.get(wanted.name)
        if tensor is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {wanted.name}; it has {len(self.tensors)}, {_some(self.tensors)}; "
                "load it into the model that was saved"
            )
        if tensor.shape != wanted.shape:
            raise CheckpointError(
                f"{wanted.name} has the shape {tensor.shape} in {self.folder}, but {wanted.shape} is wanted; "
                "load it into the model that was saved"
            )
        check_conversion(tensor.dtype, wanted.dtype, wanted.name)
        parts, overlaps = tensor.parts()
        for target in wanted.parts():
            left = [target.box]
            for number in overlaps.of(target.box):
                stored, source = parts[number]
                boxes = [box for rest in left if (box := rest.intersection(source.box))]
                left = [rest for each in left for rest in uncovered(each, [source.box])]
                common = source.box.intersection(target.box)
                if common:
                    yield _Copy(piece, target, stored, source, common, boxes)
            if left:
                raise CheckpointError(
                    f"{self.folder} does not have elements {left[0]} of {wanted.name} {wanted.shape}; load another step"
                )

    def fill(self, pieces: Iterable[Piece], copies: Iterable[_Copy]) -> None:
        """Do the copies; pieces on a device are filled in this machine's memory first."""
        buffers = {id(piece): _buffer(piece) for piece in pieces}
        files: dict[str, TensorFile] = {}
        for copy in copies:
            if copy.stored.file not in files:
                files[copy.stored.file] = TensorFile(self.folder / copy.stored.file)
            self._copy(copy, files[copy.stored.file], buffers[id(copy.piece)])
        for piece in pieces:
            if buffers[id(piece)] is not piece.values:
                piece.values[...] = array_module(piece.values).asarray(buffers[id(piece)])

    def _copy(self, copy: _Copy, file: TensorFile, buffer: npt.NDArray[Any]) -> None:
        region = copy.stored.region
        values = file.values(copy.stored.key, check_dtype(region.dtype), region.count)
        for box in copy.boxes:
            copy.target.view(buffer, box)[...] = convert(copy.source.view(values, box), buffer.dtype, region.name)
        if sum(box.size for box in copy.boxes) < copy.common.size:
            there = np.ascontiguousarray(copy.target.view(buffer, copy.common))
            here = np.ascontiguousarray(convert(copy.source.view(values, copy.common), buffer.dtype, region.name))
            if there.tobytes() != here.tobytes():
                raise CheckpointError(
                    f"{file.path} has other values for elements {copy.common} of {region.name} than another file of "
                    "that checkpoint; the ranks that saved it held different values, so load another step"
                )

    def tensor(self, entry: Entry) -> npt.NDArray[Any]:
        """Return a whole tensor."""
        tensor = np.empty(entry.shape, check_dtype(entry.dtype))
        piece = Piece.whole(entry.key, tensor)
        self.fill([piece], self.plan(piece))
        return tensor


def _buffer(piece: Piece) -> npt.NDArray[Any]:
    if isinstance(piece.values, np.ndarray):
        return piece.values
    return np.empty(piece.values.size, piece.values.dtype)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (" …" if len(listed) > 5 else "")
