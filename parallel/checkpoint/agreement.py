"""How ranks agree: what goes wrong on one of them is raised on all, with the same words, and nobody waits in vain."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from collectives import CommunicationError

if TYPE_CHECKING:
    from types import TracebackType

    from collectives import Communicator


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved or loaded; the message says what, where, what was expected, and the way out."""


class Attempt:
    """A stretch of work that may fail on this rank alone: `with attempt:` keeps its error for `agree`.

    Only what ends the communication itself, or the process, passes through.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, CommunicationError):
            return False
        self.error = error
        return True

    @property
    def text(self) -> str | None:
        """The error in words, with its type where the words were not written for the reader."""
        if self.error is None or isinstance(self.error, CheckpointError | OSError):
            return None if self.error is None else str(self.error)
        return f"{type(self.error).__name__}: {self.error}"


def exchange(communicator: Communicator, document: Any) -> list[Any]:
    """Return the JSON documents of all ranks, in their order."""
    mine = np.frombuffer(json.dumps(document).encode(), np.uint8)
    counts = communicator.all_gather(np.array([mine.size], np.int64)).ravel()
    everyone = communicator.all_gather_v(mine, counts.tolist())
    return [json.loads(part.tobytes()) for part in np.split(everyone, np.cumsum(counts)[:-1])]


def agree(communicator: Communicator, attempt: Attempt, document: Any = None) -> list[Any]:
    """Return the documents of all ranks if the attempt succeeded on all; raises CheckpointError on all otherwise."""
    answers = exchange(communicator, [attempt.text, None if attempt.error else document])
    failed = [rank for rank, (text, _) in enumerate(answers) if text is not None]
    if failed:
        text = answers[failed[0]][0]
        others = f" (rank {', '.join(map(str, failed[1:]))} failed too)" if failed[1:] else ""
        raise CheckpointError(f"rank {failed[0]}: {text}{others}") from attempt.error
    return [document for _, document in answers]
