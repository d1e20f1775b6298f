"""Handles of calls that have been started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Work(Generic[Result]):
    """A call made with `async_op=True`.

    It advances whenever this process waits in, polls or starts any call on a communicator of the same `init`. The arrays
    belong to the call until it is done.
    """

    def __init__(self, result: Result, poll: Callable[[], bool], wait: Callable[[float | None], None]) -> None:
        self._result, self._poll, self._wait = result, poll, wait

    def done(self) -> bool:
        """Advance without waiting; returns whether the result is there. Raises as `wait` does."""
        return self._poll()

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the result and return it.

        `timeout`: seconds, the communicator's by default. Raises CollectiveTimeout, CollectiveMismatch, PeerLost.
        """
        self._wait(timeout)
        return self._result
