"""Handles of calls that have been started."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from transports.environment import check_timeout

Result = TypeVar("Result")


class Work(Generic[Result]):
    """A call made with `async_op=True`.

    Over shared memory it advances by itself; over messages, whenever this process waits in, polls or starts any call on a
    communicator of the same `init`. The arrays belong to the call until it is done.
    """

    def __init__(
        self,
        result: Result,
        poll: Callable[[], bool],
        wait: Callable[[float | None], None],
        interval: Callable[[], tuple[float, float]],
    ) -> None:
        self._result, self._poll, self._wait, self._interval = result, poll, wait, interval

    def done(self) -> bool:
        """Advance without waiting; returns whether the result is there. Raises as `wait` does."""
        return self._poll()

    @property
    def interval(self) -> tuple[float, float] | None:
        """When this rank made the first step of the call, and the last, in seconds of `time.perf_counter`.

        None before it is done, and for small calls over shared memory, which are not timed.
        """
        began, ended = self._interval()
        return (began, ended) if ended else None

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the result and return it.

        `timeout`: seconds, the communicator's by default. Raises CollectiveTimeout, CollectiveMismatch, PeerLost.
        """
        self._wait(None if timeout is None else check_timeout(timeout, "wait: timeout"))
        return self._result


class PersistentCall:
    """A collective on arrays that stay the same, planned once: `call()`, or `call.start()` and later `call.wait()`.

    Made by `Communicator.plan_all_reduce` and its like. It holds the arrays; every rank must make the same calls in the same
    order, as with those that are not planned. This one makes the whole call anew each time; over shared memory there is a
    quicker one.
    """

    def __init__(self, call: Callable[[], Work[Any]]) -> None:
        self._call = call
        self._work: Work[Any] | None = None

    def __call__(self) -> Any:
        """Run to the end; returns the result, the same array every time. Raises as the collective does."""
        self.start()
        return self.wait()

    def start(self) -> None:
        """Begin; raises RuntimeError where what was started before is not done."""
        if not self.done():
            raise RuntimeError("this planned call is still under way: wait for it before it is made again")
        self._work = self._call()

    def done(self) -> bool:
        """Whether what was started last, if anything was, is done. Raises as the collective does."""
        return self._work is None or self._work.done()

    def wait(self) -> Any:
        """Wait for what was started last; returns the result."""
        if self._work is None:
            raise RuntimeError("this planned call was never started")
        return self._work.wait()


class MappedPersistentCall(PersistentCall):
    """A persistent call over shared memory; `fixed` is the native engine's, `check` raises what has failed the job.

    `keep` holds the arrays of what is under way when this is forgotten.
    """

    def __init__(
        self,
        fixed: Any,
        result: object,
        arrays: object,
        check: Callable[[], None],
        keep: Callable[[Any, object], Any],
    ) -> None:
        self._fixed, self._result, self._arrays, self._check, self._keep = fixed, result, arrays, check, keep

    def __del__(self) -> None:
        """The engine may still write to the arrays."""
        if not self._fixed.finished:
            self._keep(self._fixed.pending, self._arrays)

    def __call__(self) -> Any:
        """As `PersistentCall`."""
        if not self._fixed.run():
            self._refuse()
        return self._result

    def start(self) -> None:
        """As `PersistentCall`."""
        if not self._fixed.start():
            self._refuse()

    def done(self) -> bool:
        """As `PersistentCall`."""
        return bool(self._fixed.done())

    def wait(self) -> Any:
        """As `PersistentCall`."""
        self._fixed.wait()
        return self._result

    def _refuse(self) -> None:
        if not self._fixed.finished:
            raise RuntimeError("this planned call is still under way: wait for it before it is made again")
        self._check()
        raise RuntimeError("the communicator of this planned call is closed, or has failed")
