"""Saving: every rank writes a share of the pieces to a file of its own, in the background if wanted."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from parallel.checkpoint.agreement import Attempt, CheckpointError, agree
from parallel.checkpoint.dtypes import fingerprint, on_host
from parallel.checkpoint.folder import Lock, Partial, check_shared
from parallel.checkpoint.manifest import Manifest, Stored
from parallel.checkpoint.pieces import Box, Region, uncovered
from parallel.checkpoint.tensor_file import Entry, Sum, ordered, write

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from collectives import Communicator
    from parallel.checkpoint.pieces import Piece


def save(
    directory: str | os.PathLike[str],
    communicator: Communicator,
    pieces: Sequence[Piece],
    metadata: Any,
    step: int,
    *,
    keep: int | None = None,
) -> None:
    """Save a checkpoint, together with all ranks of the communicator; it is on the disk when this returns.

    Arguments: `directory`, the same on all ranks and on a file system that they share; `pieces`, this rank's,
    which together with those of the others are whole tensors (a rank may have none; of replicas, which must be
    equal, one rank writes each); `metadata`, anything that JSON can hold, the same on all ranks, and `step`, the number
    that the checkpoint goes by; `keep`, how many checkpoints may remain up to this step, by default all.

    Raises CheckpointError, with the same words on all ranks, if anything is wrong on any of them; checkpoints
    that were there before are then as they were.
    """
    with Saver(directory, communicator, keep=keep) as saver:
        saver._begin(pieces, metadata, step, snapshot=False)


class Saver:
    """Saves checkpoints in the background: `start` copies the pieces and returns, and a thread writes the copy.

    All methods but `close` are collective. The communicator is used by the thread that calls them, never by
    the one that writes. From the first `start` to `close`, no other job can save to the directory; `with`
    waits and closes. Arguments and errors are those of `save`; an error of the thread is raised by the next
    `start`, `poll` or `wait`, on all ranks.
    """

    def __init__(
        self, directory: str | os.PathLike[str], communicator: Communicator, *, keep: int | None = None
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1, or None to remove nothing")
        self.directory, self.communicator, self.keep = Path(directory), communicator, keep
        self._lock: Lock | None = None
        self._writing: _Writing | None = None

    def start(self, pieces: Sequence[Piece], metadata: Any, step: int) -> None:
        """Begin to save the pieces as they are now; what they hold may change as soon as this returns.

        Waits for the save before this one, if that is still under way.
        """
        self._begin(pieces, metadata, step, snapshot=True)

    def poll(self) -> bool:
        """Return whether nothing is being saved any more, the same on all ranks; what all have written is committed."""
        if self._writing is None:
            return True
        done = np.array([not self._writing.is_alive()], np.int64)
        if not self.communicator.all_gather(done).all():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Wait for what is being saved, and commit it."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        writing.join()
        try:
            totals = agree(self.communicator, writing.attempt, writing.total and vars(writing.total))
        except CheckpointError:
            self._abandon(writing.partial)
            raise
        commit = Attempt()
        if writing.partial:
            with commit:
                files = dict(zip(writing.plan.files, (Sum(**total) for total in totals), strict=True))
                manifest = Manifest(writing.plan.step, writing.plan.metadata, files, writing.plan.stored)
                writing.partial.commit(manifest, self.keep)
        agree(self.communicator, commit)

    def close(self) -> None:
        """Let other jobs save to the directory; what has not been waited for is lost."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:  # else other ranks may be elsewhere
                self.wait()
        finally:
            self.close()

    def _begin(self, pieces: Sequence[Piece], metadata: Any, step: int, *, snapshot: bool) -> None:
        self.wait()
        communicator = self.communicator
        values: list[npt.NDArray[Any]] = []
        offer: dict[str, Any] = {}
        attempt = Attempt()
        with attempt:
            values = [on_host(piece.values) for piece in pieces]
            offer = _offer(pieces, values, metadata, step)
        plan = _plan(agree(communicator, attempt, offer), json.loads(json.dumps(metadata)))

        partial: Partial | None = None
        if communicator.rank == 0:
            with attempt:
                partial = self._open(step)
        name, nonce = agree(communicator, attempt, partial and (partial.path.name, partial.nonce))[0]

        file = plan.files[communicator.rank]
        tensors: dict[str, npt.NDArray[Any]] = {}
        with attempt:
            check_shared(self.directory / name, nonce)
            _check_whole(plan.tensors[communicator.rank :: communicator.size])
            position = {Region.of(document): number for number, (document, _) in enumerate(offer["pieces"])}
            for stored in plan.stored:
                if stored.file == file:
                    number = position[stored.region]
                    tensor = values[number].reshape(_shape(stored.region))
                    # What came from a device is a copy already.
                    borrowed = values[number] is pieces[number].values
                    tensors[stored.key] = tensor.copy() if snapshot and borrowed else tensor
        try:
            agree(communicator, attempt)
        except CheckpointError:
            self._abandon(partial)
            raise
        self._writing = _Writing(self.directory / name / file, tensors, plan, partial)
        self._writing.start()

    def _abandon(self, partial: Partial | None) -> None:
        """Remove what was written; no rank goes on before it is gone."""
        if partial:
            partial.discard()
        agree(self.communicator, Attempt())

    def _open(self, step: int) -> Partial:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = Lock(self.directory)
        return Partial(self.directory, step)


class _Writing(threading.Thread):
    """The thread that writes this rank's file; `total` is what it wrote, unless `attempt` has an error."""

    def __init__(self, path: Path, tensors: dict[str, npt.NDArray[Any]], plan: Plan, partial: Partial | None) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.plan, self.partial = plan, partial
        self.attempt = Attempt()
        self.total: Sum | None = None
        self._path, self._tensors = path, tensors

    def run(self) -> None:
        with self.attempt:
            entries = ordered(Entry(key, values.dtype.name, values.shape) for key, values in self._tensors.items())
            self.total = write(self._path, entries, (self._tensors[entry.key] for entry in entries))
        self._tensors = {}


@dataclass(frozen=True)
class Plan:
    """Who writes what, the same on all ranks: the file of each rank, and the file of each region."""

    step: int
    metadata: Any
    files: list[str]
    tensors: list[list[Region]]
    stored: list[Stored]


def _offer(pieces: Sequence[Piece], values: Sequence[npt.NDArray[Any]], metadata: Any, step: Any) -> dict[str, Any]:
    """Return what the other ranks must know of this one's pieces."""
    if not isinstance(step, int | np.integer) or step < 0:
        raise CheckpointError(f"the step is {step!r}; expected an integer from 0 on")
    try:
        text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the metadata cannot be written as JSON: {error}") from error
    return {
        "step": int(step),
        "metadata": hashlib.sha256(text.encode()).hexdigest(),
        "pieces": [
            (piece.region().document(), fingerprint(array)) for piece, array in zip(pieces, values, strict=True)
        ],
    }


def _plan(offers: list[dict[str, Any]], metadata: Any) -> Plan:
    """Return who writes what; raises CheckpointError where the ranks' offers contradict each other."""
    for field in ("step", "metadata"):
        for rank, offer in enumerate(offers):
            if offer[field] != offers[0][field]:
                what = f"step {offer[field]} and rank 0 step {offers[0][field]}" if field == "step" else "other metadata than rank 0"  # fmt: skip
                raise CheckpointError(f"rank {rank} saves {what}; all ranks must give the same")
    tensors: dict[str, tuple[int, Region]] = {}
    holders: dict[Region, dict[int, int]] = {}
    for rank, offer in enumerate(offers):
        for document, digest in offer["pieces"]:
            region = Region.of(document)
            first, other = tensors.setdefault(region.name, (rank, region))
            if (other.shape, other.dtype) != (region.shape, region.dtype):
                raise CheckpointError(
                    f"{region.name} is {region.dtype} {region.shape} on rank {rank} and {other.dtype} {other.shape} "
                    f"on rank {first}; a name must mean one tensor on all ranks"
                )
            same = holders.setdefault(region, {rank: digest})
            first = min(same)
            if same.setdefault(rank, digest) != digest or same[first] != digest:
                raise CheckpointError(
                    f"ranks {first} and {rank} hold different values of {region}; replicas must be equal, so look "
                    "for a step that was not taken, or not reduced, on all ranks"
                )
    step, ranks = offers[0]["step"], len(offers)
    files = [f"rank-{rank:04d}-of-{ranks:04d}.safetensors" for rank in range(ranks)]
    regions: dict[str, list[Region]] = {name: [] for name in tensors}
    stored, used = [], [set[str]() for _ in files]
    for region, rank in assign(holders, ranks).items():
        regions[region.name].append(region)
        key, number = region.name, 0
        while key in used[rank]:
            number += 1
            key = f"{region.name}@{number}"
        used[rank].add(key)
        stored.append(Stored(region, files[rank], key))
    return Plan(step, metadata, files, list(regions.values()), stored)


def assign(holders: Mapping[Region, Iterable[int]], ranks: int) -> dict[Region, int]:
    """Return which of its holders writes each region, so that the ranks write about as many bytes each."""
    load = [0] * ranks
    writers = dict.fromkeys(holders, 0)
    # Those with a choice come last, the largest first, and go where least is to be written.
    for region in sorted(holders, key=lambda r: (len({*holders[r]}) > 1, -r.nbytes)):
        writers[region] = min(holders[region], key=lambda rank: (load[rank], rank))
        load[writers[region]] += region.nbytes
    return writers


def _check_whole(tensors: Sequence[Sequence[Region]]) -> None:
    """Raise CheckpointError unless the regions of each tensor are all of it."""
    for regions in tensors:
        shape = regions[0].shape
        missing = uncovered(Box((0,) * len(shape), shape), (part.box for r in regions for part in r.parts()))
        if missing:
            raise CheckpointError(
                f"no rank holds elements {missing[0]} of {regions[0].name} {shape}; the pieces of all ranks must "
                "together be the whole tensor"
            )


def _shape(region: Region) -> tuple[int, ...]:
    """The shape of its values in a file: that of the box if they are all of it, else flat."""
    return region.extent if region.count == region.box.size else (region.count,)
