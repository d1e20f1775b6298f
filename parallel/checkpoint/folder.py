"""The directory of checkpoints: what is in it, and how a new one takes its place whole or not at all.

step-00000100/      a checkpoint; it gets this name when all of it is on the disk
step-00000100.old/  the one that it replaces, for the instant between two renames
latest              the name of the one that was saved last
.partial-…          one that is being written, or removed; what a killed job left is removed by the next save
.lock               locked by the job that saves
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from parallel.checkpoint.agreement import CheckpointError
from parallel.checkpoint.manifest import NAME, Manifest
from parallel.checkpoint.tensor_file import reading, writing

if TYPE_CHECKING:
    from typing import IO

_STEP = re.compile(r"step-(\d{8,})(\.old)?")
_PARTIAL = ".partial-"
_NONCE = "nonce"
_LATEST = "latest"
# A file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def steps(directory: str | os.PathLike[str]) -> list[int]:
    """Return the steps of all checkpoints in the directory, ascending."""
    return sorted(_folders(Path(directory)))


def latest(directory: str | os.PathLike[str]) -> int | None:
    """Return the step that was saved last, or None if there is no checkpoint."""
    folders = _folders(Path(directory))
    try:
        match = _STEP.fullmatch((Path(directory) / _LATEST).read_text().strip())
    except (OSError, UnicodeDecodeError):
        match = None
    if match and int(match[1]) in folders:
        return int(match[1])
    # A job that was killed in its first save leaves a whole checkpoint and no pointer yet.
    return max(folders, default=None)


def locate(directory: str | os.PathLike[str], step: int | None = None) -> Path:
    """Return the folder of a step, by default of the latest; raises CheckpointError if there is none."""
    folders = _folders(Path(directory))
    chosen = latest(directory) if step is None else step
    if chosen is None:
        raise CheckpointError(f"there is no checkpoint in {directory}; expected a folder such as step-00000100 there")
    if chosen not in folders:
        there = ", ".join(map(str, sorted(folders))) or "none"
        raise CheckpointError(f"there is no checkpoint of step {chosen} in {directory}; the steps there are: {there}")
    return folders[chosen]


def _folders(directory: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    with reading(directory):
        names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    for name in names:  # step-1.old comes after step-1
        if match := _STEP.fullmatch(name):
            found.setdefault(int(match[1]), directory / name)
    return found


class Lock:
    """Keeps other jobs from saving to the same directory. The system drops it when the process ends, however it does.

    Raises CheckpointError, naming the holder, if another has it. A file system without locks is taken as free.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / ".lock"
        with writing(path):
            self._file: IO[str] = path.open("a+", encoding="utf-8")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.seek(0)
                holder = self._file.read().strip() or "unknown"
                self._file.close()
                raise CheckpointError(
                    f"another job is saving to {directory} (it is {holder}); "
                    "give each job a directory of its own, or end the other"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    self._file.close()
                    raise
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self._file.flush()

    def release(self) -> None:
        """Let others save."""
        self._file.close()


class Partial:
    """A checkpoint that is being written, seen from the rank that makes and commits it.

    Creating one removes what killed jobs left. Raises CheckpointError if that, or its folder, cannot be.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self.directory, self.name = directory, f"step-{step:08d}"
        self.nonce = secrets.token_hex(16)
        self.path = directory / f"{_PARTIAL}{self.name}-{self.nonce[:8]}"
        self._pointer = directory / f"{_PARTIAL}{_LATEST}"
        with writing(self.path):
            self._tidy()
            self.path.mkdir()
            (self.path / _NONCE).write_text(self.nonce)

    def _tidy(self) -> None:
        for left in self.directory.glob(_PARTIAL + "*"):
            # A rank that outlived its job may still write there; then the next save removes the rest.
            shutil.rmtree(left, ignore_errors=True)
        self._pointer.unlink(missing_ok=True)
        for old in self.directory.glob("step-*.old"):
            new = old.with_suffix("")
            if new.exists():
                self._remove(old)
            else:
                old.rename(new)

    def commit(self, manifest: Manifest, keep: int | None) -> None:
        """Make it the latest checkpoint, then remove older ones beyond `keep`; raises CheckpointError.

        Everything is on the disk before the name is given, and the name before the pointer. Steps after this
        one, which a job that went back to an earlier one finds, are left alone.
        """
        final, old = self.directory / self.name, self.directory / f"{self.name}.old"
        try:
            with writing(self.path / NAME):
                _write(self.path / NAME, manifest.text())
            with writing(self._pointer):
                _write(self._pointer, self.name + "\n")
            with writing(final):
                (self.path / _NONCE).unlink()
                _sync(self.path)
                if final.exists():
                    final.rename(old)
                self.path.rename(final)
                _sync(self.directory)
                self._pointer.replace(self.directory / _LATEST)
                _sync(self.directory)
        except CheckpointError:
            self.discard()
            if old.exists() and not final.exists():
                old.rename(final)
            raise
        with writing(self.directory):
            if old.exists():
                self._remove(old)
            if keep is not None:
                earlier = [n for n in steps(self.directory) if n < manifest.step]
                for step in earlier[: max(0, len(earlier) - keep + 1)]:
                    self._remove(locate(self.directory, step))

    def _remove(self, folder: Path) -> None:
        # Half removed it must not be taken for a checkpoint.
        doomed = self.directory / f"{_PARTIAL}removed-{folder.name}-{secrets.token_hex(4)}"
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def discard(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._pointer.unlink(missing_ok=True)


def check_shared(path: Path, nonce: str) -> None:
    """Raise CheckpointError unless this rank sees, in the folder at `path`, the nonce that rank 0 wrote there."""
    try:
        found = (path / _NONCE).read_text()
    except OSError as error:
        found = str(error)
    if found != nonce:
        raise CheckpointError(
            f"does not see in {path} the file that rank 0 wrote there ({found}); all ranks must be given the same "
            "directory, on a file system that all hosts share"
        )


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
